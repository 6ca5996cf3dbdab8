"""The configuration of a run: frozen dataclasses, one for each section of a configuration file.

`Config` is that of pre-training: `[model]` is `LlamaConfig`, `[data]` is `DataConfig` and `[mesh]`
is `MeshConfig`; `[optimizer]`, `[training]` and the conditions between sections are defined here.
`galore` itself validates its settings. `FinetuneConfig` is that of a fine-tuning on GLUE.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from galore_jax.data.batches import DataConfig
from galore_jax.data.glue_tasks import TASKS
from galore_jax.errors import InputError, require_choice
from galore_jax.grads.layerwise import ClipBy
from galore_jax.models.adapters import Adapter
from galore_jax.models.llama import LlamaConfig
from galore_jax.ops.implementation import Implementation
from galore_jax.optim.galore import galore
from galore_jax.settings import checked
from galore_jax.subspace.projection import Moments, ProjType
from galore_jax.subspace.rules import Rule
from galore_jax.training.mesh import MeshConfig

Optimizer = Literal[
    "adamw",
    "adamw8bit",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_adafactor",
    "galore_lion",
    "galore_muon",
    "galore_muon8bit",
    "galore_fira",
    "apollo",
    "muon",
    "muon8bit",
    "normuon",
    "foam",
    "scale",
    "lora",
    "relora",
    "lowrank",
]
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
# Below 1 in float32 too: with a decay of 1, bias corrections divide by 0.
Decay = Annotated[float, Field(ge=0, lt=1 - 2**-25)]


@checked("optimizer.galore")
@dataclass(frozen=True)
class GaloreConfig:
    """`[optimizer.galore]`: arguments of `galore_jax.galore`, which validates them.

    Attributes:
      rank: columns of each basis, or their number as a fraction of a matrix's smaller side.
      attention_rank: the same for the kernels of attention, `rank` then for all others; None: one
        rank for all.
      update_proj_gap: steps between two refreshes of the bases.
      scale: factor of the lifted update; None: the default of the optimizer in `galore_jax`, 0.25,
        or 1 for Muon and APOLLO, for the latter at rank 1 √128.
      proj_type: which side is projected: `"std"`, `"reverse_std"`, `"left"`, `"right"`, `"full"`.
      refresh: how a basis is computed: `"subspace_iteration"`, `"eigh"`, `"svd"` or `"random"`;
        None: the first of these, with APOLLO the last.
      moments: what a refresh does with the moments: `"keep"` or `"rotate"`.
      lazy_overlap: the gap of a matrix doubles, up to 8 times `update_proj_gap`, if its new
        subspace overlaps the old one at least this much; None: gaps are constant.
      basis_dtype: in which the bases are stored: `"float32"`, `"bfloat16"` or, as block-wise
        quantized codes, `"int8"` or `"int4"`.
    """

    rank: int | float = 128
    attention_rank: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = None
    update_proj_gap: int = 200
    scale: float | None = None
    proj_type: ProjType = "std"
    refresh: str | None = None
    moments: Moments = "keep"
    lazy_overlap: float | None = None
    basis_dtype: Literal["float32", "bfloat16", "int8", "int4"] = "float32"

    def __post_init__(self):
        try:
            galore(**self.given)
        except ValueError as error:
            raise InputError(f"optimizer.galore.{str(error).removeprefix('galore: ')}") from None

    @property
    def given(self) -> dict[str, Any]:
        """The arguments that are not left to the optimizer."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if attention_rank := given.pop("attention_rank", None):
            given["rules"] = {"*attention/*": Rule(rank=attention_rank)}
        return given


@checked("optimizer.lora")
@dataclass(frozen=True)
class LoraConfig:
    """`[optimizer.lora]`: the factors of LoRA, ReLoRA and `"lowrank"`.

    Attributes:
      rank: of the factors, or its fraction of a kernel's smaller side.
      alpha: the product of the factors is multiplied by alpha / rank, except with `"lowrank"`.
      dropout: rate of dropout of the factors' input, except with `"lowrank"`.
      restart_gap: steps between two restarts of ReLoRA.
    """

    rank: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 128
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    restart_gap: PositiveInt = 200


@checked("optimizer")
@dataclass(frozen=True)
class OptimizerConfig:
    """`[optimizer]`: the optimizer and its learning-rate schedule.

    Plain AdamW and Muon use neither of the tables, LoRA, ReLoRA and low-rank factors only `lora`.

    Attributes:
      name: `"adamw"`, `"galore_adamw"` or `"galore_muon"`, each with the suffix `8bit` for moments
        in 8 bits; `"galore_adafactor"`, `"galore_lion"`, `"galore_fira"` or `"apollo"`; `"muon"`,
        `"muon8bit"`, `"normuon"`, `"foam"` or `"scale"`, of full gradients and full rank; or
        `"lora"`, `"relora"` or `"lowrank"`. What is not one of the matrices has AdamW, but for
        `"scale"`, which keeps a moment of the head, and moments of vectors alone.
      learning_rate: the peak, reached after the warm-up.
      matrix_rate: factor of the learning rate of the matrices: the kernels of the blocks, which
        GaLore projects, whatever the optimizer, or their low-rank factors. With GaLore it
        multiplies the lifted update, as `scale` does. Weight decay is decoupled: it has the
        learning rate without this factor.
      warmup_steps: updates of linear warm-up.
      floor: the last update's learning rate, as a fraction of the peak.
      b1: decay of the first moment (with 0 Adafactor keeps none); for Lion its weight in the
        update.
      b2: decay of AdamW's second moment, None: 0.999; of Lion's only moment, None: 0.99.
      eps: added to the root of the second moment (AdamW).
      weight_decay: decoupled weight decay in the full space, times the learning rate.
      gradients: with GaLore, `"projected"`: the backward pass computes coordinates only, and
        sketches refresh the bases; or `"full"`, as always to refresh by `"eigh"` or `"svd"`.
      clip_norm: the largest global norm, of coordinates where gradients are projected; 0 does not
        clip. With GaLore, numbers that are not finite do not count.
      clip_by: how `training.layerwise` knows the norm before it updates the first layer:
        `"this_step"` keeps the gradients of all layers until it does, as coordinates where they are
        projected, as `training.accumulation` always does; `"previous_step"` costs no memory, but
        the first step is not clipped, and an outlier clips the step after it.
      implementation: how 8-bit moments and the lift are computed: `"xla"`, or `"pallas"` for
        kernels on TPUs and NVIDIA GPUs, which nobody has run or timed on a device yet.
      galore: how gradients are projected.
      lora: the low-rank factors.

    Raises:
      InputError: a value out of range, or settings that exclude each other.
    """

    name: Optimizer = "galore_adamw"
    learning_rate: PositiveFloat = 0.01
    matrix_rate: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 1000
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    b1: Decay = 0.9
    b2: Decay | None = None
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.0
    gradients: Literal["projected", "full"] = "projected"
    clip_norm: NonNegativeFloat = 0.0
    clip_by: ClipBy = "this_step"
    implementation: Implementation = "xla"
    galore: GaloreConfig = field(default_factory=GaloreConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        cannot = self.galore.proj_type == "full" or self.galore.moments != "keep"
        if self.name in ("galore_fira", "apollo") and cannot:
            raise InputError(
                f'optimizer.name = "{self.name}" scales what is not projected and keeps its '
                'moments: set optimizer.galore.moments = "keep", and a proj_type other than "full".'
            )

    @property
    def adapter(self) -> Adapter | None:
        """The low-rank factors of LoRA, ReLoRA and `"lowrank"`."""
        lora = self.lora
        if self.name == "lowrank":
            return Adapter(lora.rank, has_kernel=False)
        has_adapter = self.name in ("lora", "relora")
        return Adapter(lora.rank, lora.alpha, lora.dropout) if has_adapter else None

    @property
    def has_galore(self) -> bool:
        """Whether `galore_jax.galore` is a part of the optimizer."""
        return self.name.startswith("galore_") and self.name != "galore_fira"

    @property
    def has_projected_gradients(self) -> bool:
        """Whether the backward pass projects gradients."""
        has_sketches = self.galore.refresh not in ("eigh", "svd")
        return self.has_galore and self.gradients == "projected" and has_sketches

    @property
    def has_refreshes(self) -> bool:
        """Whether some steps begin with a refresh of bases, or a restart of ReLoRA."""
        return self.has_projected_gradients or self.name == "relora"


@checked("training")
@dataclass(frozen=True)
class TrainingConfig:
    """`[training]`: the length of the run, evaluation, checkpoints and output.

    Attributes:
      steps: number of updates.
      seed: random seed of the initial parameters, of stochastic rounding and of adapters.
      accumulation: micro-batches per step; memory for activations shrinks by this factor.
      layerwise: update each layer as soon as the backward pass has its gradient, so that only one
        layer's gradient and update exist at a time: see grads/layerwise.py.
      evaluate_every: updates between evaluations; 0 evaluates at the end only.
      evaluation_tokens: number of targets to evaluate on; 0 evaluates on the full validation split.
      checkpoint_every: updates between checkpoints, of which the last two are kept; 0 saves at the
        end only.
      log_every: updates between reads of the metrics from the device; every step has its line.
      folder: folder of the run: config.toml, text.json (a fingerprint of the training text),
        metrics.jsonl, checkpoints/, curves.png, summary.json.
    """

    steps: Annotated[int, Field(ge=1, lt=2**31)] = 10_000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    accumulation: PositiveInt = 1
    layerwise: bool = False
    evaluate_every: NonNegativeInt = 1000
    evaluation_tokens: NonNegativeInt = 0
    checkpoint_every: NonNegativeInt = 1000
    log_every: PositiveInt = 10
    folder: Annotated[str, Field(min_length=1)] = "runs/run"


@checked("")
@dataclass(frozen=True)
class Config:
    """The configuration of a run, one attribute for each section of the file.

    Raises:
      InputError: the sections do not fit together: micro-batches that do not divide the batch, a
        warm-up longer than the training, settings that a layer-wise step cannot have, or low-rank
        factors in place of a checkpoint's matrices or beside weights in 8 bits.
    """

    model: LlamaConfig = field(default_factory=LlamaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if self.data.batch_size % self.training.accumulation:
            raise InputError(
                f"training.accumulation is {self.training.accumulation}, which does not divide "
                f"data.batch_size, {self.data.batch_size}: choose a divisor."
            )
        if self.optimizer.warmup_steps > self.training.steps:
            raise InputError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, but training.steps is "
                f"only {self.training.steps}: shorten the warm-up too."
            )
        if self.optimizer.name == "lowrank" and self.model.checkpoint:
            raise InputError(
                'optimizer.name = "lowrank" trains random factors in place of the matrices of '
                'model.checkpoint: leave out the checkpoint, or set optimizer.name = "lora".'
            )
        if self.model.weights == "int8" and self.optimizer.adapter is not None:
            raise InputError(
                f'model.weights = "int8" excludes optimizer.name = "{self.optimizer.name}", which '
                'trains low-rank factors: set it to "plain", or choose another optimizer.'
            )
        if self.training.layerwise and self.optimizer.adapter is not None:
            raise InputError(
                f'training.layerwise excludes optimizer.name = "{self.optimizer.name}", which '
                "trains low-rank factors: set it to false, or choose another optimizer."
            )


@checked("model")
@dataclass(frozen=True)
class CheckpointConfig:
    """`[model]`: the encoder to start from.

    Attributes:
      checkpoint: a Hugging Face folder of a RoBERTa or BERT: config.json, safetensors, tokenizer.
    """

    checkpoint: Annotated[str, Field(min_length=1)] = ""


@checked("data")
@dataclass(frozen=True)
class GlueConfig:
    """`[data]`: the task and its rows of tokens.

    Attributes:
      task: one of `galore_jax.data.glue_tasks.TASKS`.
      source: a folder with a folder of GLUE's TSV files for each task.
      sequence_length: tokens per row; longer pairs are truncated.
      batch_size: rows per step.
    """

    task: str = "rte"
    source: str = "glue"
    sequence_length: Annotated[int, Field(ge=8)] = 128
    batch_size: PositiveInt = 16

    def __post_init__(self):
        require_choice("data.task", self.task, TASKS)


@checked("training")
@dataclass(frozen=True)
class EpochsConfig:
    """`[training]`: epochs, seeds, and the folder of the results.

    Attributes:
      epochs: passes over the training examples, each followed by an evaluation.
      seeds: number of runs, with the seeds 0, 1, 2, … of the head, the order and dropout.
      folder: where the results go: config.toml and summary.json, and for each seed seed-N/ with
        metrics.jsonl, the best checkpoint and result.json.
    """

    epochs: PositiveInt = 30
    seeds: PositiveInt = 5
    folder: Annotated[str, Field(min_length=1)] = "runs/glue"


@checked("")
@dataclass(frozen=True)
class FinetuneConfig:
    """The configuration, one attribute for each section of the file.

    With LoRA only the adapters and the head of the classifier are trained.

    Raises:
      InputError: the optimizer is for pre-training only.
    """

    model: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: GlueConfig = field(default_factory=GlueConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: EpochsConfig = field(default_factory=EpochsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if self.optimizer.name in ("relora", "lowrank"):
            raise InputError(
                f'optimizer.name = "{self.optimizer.name}" is for pre-training: choose "lora", '
                "which keeps the checkpoint's matrices."
            )
