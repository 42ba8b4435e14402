"""Conversations with tools: environment classes, tool functions, and what a recipe's [environment] means."""
