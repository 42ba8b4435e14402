"""Recipes: the typed tree of settings, where each came from, and how files are read. Unknown keys are refused."""

from groupwise.config.loading import dump as dump
from groupwise.config.loading import find_recipe as find_recipe
from groupwise.config.loading import is_file as is_file
from groupwise.config.loading import is_sft as is_sft
from groupwise.config.loading import load as load
from groupwise.config.loading import read_toml as read_toml
from groupwise.config.loading import read_tree as read_tree
from groupwise.config.loading import shipped_recipes as shipped_recipes
from groupwise.config.sections import ClusterSection as ClusterSection
from groupwise.config.sections import CriticSection as CriticSection
from groupwise.config.sections import EnvironmentSection as EnvironmentSection
from groupwise.config.sections import LearnerSection as LearnerSection
from groupwise.config.sections import LoraSection as LoraSection
from groupwise.config.sections import ModelSection as ModelSection
from groupwise.config.sections import Recipe as Recipe
from groupwise.config.sections import RolloutsSection as RolloutsSection
from groupwise.config.sections import Section as Section
from groupwise.config.sections import SftModelSection as SftModelSection
from groupwise.config.sections import SftRecipe as SftRecipe
from groupwise.config.sections import TrackersSection as TrackersSection
from groupwise.config.source import Source as Source
from groupwise.config.source import explain as explain
