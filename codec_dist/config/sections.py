"""The sections of a config. The text under each field is also its help on the command line."""

import logging
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from codec_dist.utils import CodecError, without_credentials


class ConfigError(CodecError):
    """A config, or an override on the command line, that cannot be used."""


class PathField:
    """Marks a field as a path or URL: relative paths are taken from the config file's folder.

    Args:
        names: pattern of values that are names and no paths.
    """

    def __init__(self, names: str = "(?!)") -> None:
        self._names = re.compile(names)

    def is_name(self, value: str) -> bool:
        """Whether a value names something that is no file."""
        return self._names.fullmatch(value) is not None


# As torchvision calls its sets of weights: IMAGENET1K_V2, or ResNet50_Weights.IMAGENET1K_V2.
WEIGHT_SET = r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*"

Location = Annotated[str, PathField()]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _or_auto(kind: Any) -> Callable[[Any], Any]:
    """Checks a number of this kind, or the word `auto`, such that a wrong value is one error and not one for each."""
    adapter = TypeAdapter(kind)

    def check(value: Any) -> Any:
        try:
            return value if value == "auto" else adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{error.errors()[0]['msg']}, or `auto`") from error

    return check


AutoCount = Annotated[Literal["auto"] | Count, BeforeValidator(_or_auto(Count))]
AutoSeconds = Annotated[Literal["auto"] | Positive, BeforeValidator(_or_auto(Positive))]


class Section(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, values: Any) -> Any:
        """`none`, as the help shows it, for a setting that is off by default."""
        if not isinstance(values, dict):
            return values
        off = {name for name, field in cls.model_fields.items() if field.default is None}
        return {name: None if value == "none" and name in off else value for name, value in values.items()}


class Choice(Section):
    """A registered thing by name, with the options that it takes."""

    name: str
    """Name in the registry."""
    options: dict[str, JsonValue] = {}
    """Options that the named thing takes; checked by the registry."""


class RunSection(Section):
    """Where a run lives and what it is called."""

    directory: Location
    """Folder that holds all that the run writes."""
    name: str = "run"
    """Name shown in the report and on dashboards: any text."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed from which every random choice of the run is derived."""

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str) -> str:
        """Without control characters, on one line; an empty name is the default."""
        words = "".join(" " if unicodedata.category(each) in ("Cc", "Cs") else each for each in name).split()
        return without_credentials(" ".join(words)) or "run"


class Split(Section):
    """Fractions of the samples for fitting, for choosing, and for reporting; they add up to 1."""

    fit: Fraction = 0.6
    """Fraction on which classifiers (of the demo) and SAEs are fitted."""
    select: Fraction = 0.2
    """Fraction on which thresholds, models and top modes are chosen."""
    evaluate: Fraction = 0.2
    """Fraction from which every reported number comes."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if abs(self.fit + self.select + self.evaluate - 1) > 1e-9:
            raise ValueError(f"fit + select + evaluate is {self.fit + self.select + self.evaluate:g}, not 1")
        return self


class DataSection(Section):
    """The images: WebDataset shards and how they are divided."""

    shards: Location
    """Folder or URL of shards NAME-000000.tar, ...; DIR/train-*.tar or DIR/train-{000..012}.tar names some of them."""
    split: Split = Split()
    """Fractions of the three disjoint parts."""
    limit: Count | None = None
    """Use only the first so many samples, for a quick try."""
    image_fields: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """File extensions in the tar that hold the image; a sample has exactly one."""
    label_field: str = "cls"
    """Extension that holds the integer label; `json:FIELD` reads a field of the .json member."""
    max_bad_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """A run with a larger fraction of undecodable samples fails."""
    decode_threads: Count = 1
    """Threads that decode images in each actor."""
    prefetch: Count = 2
    """Microbatches that wait, decoded and prepared, in each actor while another is computed."""


def _check_pixels(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    if value is not None and not all(type(each) is int and each > 0 for each in numbers):
        raise ValueError("write pixels as a whole number above 0, or as [height, width]")
    return value


Pixels = Annotated[int | tuple[int, int], BeforeValidator(_check_pixels)]


class PreprocessingSettings(Section):
    """How an image becomes the model's input, where the metadata of the model's weights do not say."""

    size: Pixels
    """Height and width of the model's input in pixels: one number, or [height, width]."""
    resize: Pixels | None = None
    """Size before the central crop, as `crop` says; default: the size itself."""
    crop: Literal["center", "squash", "border"] = "center"
    """`center`: the shorter side becomes `resize`; `squash`: both sides do, whatever the image's proportions;
    `border`: the longer side does, and the rest is filled with the mean colour."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bilinear"
    """Interpolation of the resize."""
    channels: Literal[1, 3] = 3
    """Colour channels of the model's input: 1 (grey) or 3 (RGB)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean per channel, subtracted from values in [0, 1]."""
    std: tuple[Positive, ...] = (0.229, 0.224, 0.225)
    """Standard deviation per channel, divided by."""
    source: str | None = None
    """Where these values come from, for people; written into a run's config where they were not given."""


class ModelSection(Section):
    """The model that is explained."""

    spec: str
    """torchvision:resnet50, timm:vit_base_patch16_224 or module:package.file:function."""
    options: dict[str, JsonValue] = {}
    """Keyword arguments for the function that builds the model, such as `num_classes`."""
    weights: Annotated[str, PathField(names=WEIGHT_SET)] = "default"
    """`default` (the library's pretrained), the name of a set of torchvision's such as IMAGENET1K_V1, `none`
    (random), or a safetensors or state-dict file."""
    preprocessing: PreprocessingSettings | None = None
    """How images are prepared; default: as the metadata of the weights say, which own weights must bring."""

    @property
    def weights_kind(self) -> Literal["default", "none", "set", "file"]:
        """What ``weights`` is: a word, the name of a published set, or a file."""
        if self.weights in ("default", "none"):
            return self.weights  # type: ignore[return-value]
        return "set" if re.fullmatch(WEIGHT_SET, self.weights) else "file"


class AttributionSection(Section):
    """What is computed for every image."""

    layers: tuple[str, ...] = ("blocks",)
    """Layer keys, globs over module names, or presets such as `blocks`."""
    method: Choice = Choice(name="integrated_gradients", options={"steps": 10})
    """Attribution method and its options; of integrated gradients ``steps`` (a number or ``auto``), ``points``
    (``learned``, or ``uniform`` as in the paper), ``adaptive`` ({tolerance, most}) and ``baseline``."""
    target: Choice = Choice(name="top_k", options={"k": 1})
    """The scalar of the output that contributions explain, and its options; by name or import path."""
    further_targets: tuple[Choice, ...] = ()
    """More targets, explained in the same forward passes and stored beside the first."""
    activations: bool = True
    """Store reduced activations beside the contributions."""
    gradients: bool = False
    """Store reduced gradients beside the contributions."""
    microbatch: AutoCount = "auto"
    """Images that pass through the model at once; `auto`: chosen when the store is made, at most 64, from the memory
    that an actor may use."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type in which contributions are computed and stored."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Narrower type in which the model computes where autocast allows; sums stay in float32."""
    fold_batchnorm: bool = True
    """Fold BatchNorm into the convolution before it where no chosen layer lies between and it agrees (faster)."""
    channels_last: bool = True
    """Compute 2-d convolutions in the channels_last memory format where the model agrees with itself (faster)."""
    deterministic: bool = False
    """Use only deterministic kernels on CUDA (CPUs always do)."""
    allow_random: bool = False
    """Explain a network that draws random numbers in evaluation mode; its results differ from run to run."""
    allow_mixing: bool = False
    """Explain a network in which the images of a batch influence each other."""


class StoreSection(Section):
    """Where the contribution store is and how it is written; its digest and its identity do not depend on it."""

    location: Location | None = None
    """Folder or URL (s3://, gs://) of the store; default: `store` in the run's folder."""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """Compression of the arrays; a store that exists keeps its own."""
    sharding: Count | None = None
    """Rows of a chunk, with all chunks of a shard's block in one file; default: a file for each chunk."""


class ClusterSection(Section):
    """Where the work runs.

    The store depends on nothing here but the threads per actor, which are part of its identity. Trained SAEs
    depend on the number of ranks: by rounding and, with dropout, by the noise.
    """

    address: str | None = None
    """Ray cluster to join (`auto` or HOST:PORT); default: a cluster on this machine, ended with the run."""
    actors: Count | None = None
    """Extraction actors; default: one per GPU, or per CPU slot where there is no GPU."""
    cpus_per_actor: Count = 1
    """CPUs, and so threads, of each extraction actor and of each rank of training."""
    training_workers: Count | None = None
    """Ranks of SAE training; default: one per GPU, or 2 where there is none."""
    attempts: Count = 3
    """How often a shard is tried before it is reported as failed, and a training whose worker dies before it ends."""
    shard_timeout_seconds: AutoSeconds = "auto"
    """A shard that takes longer is given to another actor; `auto`: an hour until three shards are done, then ten times
    as long as shards of its size took (the median), at least 5 minutes, and twice as long with each attempt."""


class TrainingSettings(Section):
    """How SAEs are trained."""

    epochs: Count = 150
    """Passes over the rows of the fit part."""
    batch_size: Count = 128
    """Rows per step, over all ranks together."""
    learning_rate: Positive = 2e-3
    """Adam's step size."""
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    """Learning rate over time; `plateau` halves it when the loss on the select part stalls (the paper's)."""
    patience: Count = 10
    """Epochs without improvement before `plateau` halves the rate."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the epochs during which the rate rises from 0."""
    early_stop: Count | None = None
    """End the training of an SAE whose loss on the select part has not improved for so many epochs; default: never."""
    gradient_clip: Positive | None = None
    """Largest norm of an SAE's gradient, beyond which it is scaled down; default: none."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Arithmetic of matrix products on CUDA (`bfloat16`: by autocast, weights stay float32); CPUs use float32."""
    divide: bool = False
    """Spread the dictionary over the ranks, which then all see the same rows: for dictionaries beyond one device
    (not with `sae.spread: saes`)."""


class SaeGroup(Section):
    """One SAE architecture, trained for each of some layers and quantities, and for each point of a grid."""

    architecture: Choice = Choice(name="topk", options={})
    """Architecture and its options."""
    grid: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = {}
    """Lists of values by the name of an option, or by `training.NAME`: one SAE for each combination of them."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """Added to the run's seed: one SAE for each."""
    layers: tuple[str, ...] = ("*",)
    """Layer keys of the store, or globs over them."""
    quantities: tuple[str, ...] = ("contribution-positive", "activation-positive")
    """Quantities to decompose: stored ones, `…-net` (both signs added) or `…-both` (side by side), or globs."""
    training: TrainingSettings = TrainingSettings()
    """Settings of the training."""


class SelectionSettings(Section):
    """Which of several SAEs of a layer and quantity later stages use; judged on the select part."""

    l0: Positive | None = None
    """Most loadings per image: the SAE with the highest explained variance among these; default: by `ev_kept`."""
    tolerance: Annotated[float, Field(ge=0)] = 0.1
    """Fraction by which the measured number of loadings may exceed `l0`."""
    ev_kept: Fraction = 0.95
    """Without `l0`: the sparsest SAE that keeps this fraction of the highest explained variance."""
    minimum_stability: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least median cosine of modes with those matched in other seeds (needs several seeds); default: any."""


class SaeSection(Section):
    """The sparse autoencoders."""

    groups: tuple[SaeGroup, ...] = (SaeGroup(),)
    """Groups of SAEs; all are trained in one go."""
    evaluations: Count = 10
    """How many times during training the held-out metrics are computed and logged."""
    checkpoints: Count = 5
    """How many times during training a state to resume from is written."""
    spread: Literal["rows", "saes"] = "rows"
    """What the ranks divide: the rows of every batch, or the layers and quantities, each trained by one rank."""
    selection: SelectionSettings = SelectionSettings()
    """Which of several SAEs of a layer and quantity later stages use."""

    @field_validator("spread", mode="before")
    @classmethod
    def _renamed(cls, value: object) -> object:
        """The name of earlier versions, for one more."""
        if value != "bundles":
            return value
        logging.getLogger(__name__).warning(
            "sae.spread: `bundles` is called `saes` now; the old name goes with the next version"
        )
        return "saes"


class ModesSection(Section):
    """The summary of what modes say about classes."""

    correlation_threshold: Fraction = 0.2
    """A mode with a class correlation above this counts as class-correlated."""
    concepts: Location | None = None
    """JSON file {concept: [class names or indices]} for superclasses."""
    unstable_below: Fraction = 0.7
    """A mode whose mean cosine with the modes matched in other seeds is below this is marked as unstable."""


class InterventionsSection(Section):
    """The causal tests."""

    percentages: tuple[Annotated[float, Field(gt=0, le=100)], ...] = (1, 2, 5, 10, 18, 25, 50, 80, 99)
    """Percentages of a layer's channels that are ablated or preserved."""
    layers: tuple[str, ...] = ("*",)
    """Layer keys of the store, or globs over them."""
    quantities: tuple[str, ...] = ("contribution-positive", "activation-positive")
    """Quantities whose SAE modes rank the channels."""
    targets: Count | None = 100
    """Target classes: at most so many, chosen at random; null: all. Each costs (quantities + `random_draws`) x 2 x
    `percentages` x (1 + `off_targets`) x `images_per_class` passes through the rest of the model, at each layer."""
    off_targets: Count = 5
    """Random off-target classes for each target class."""
    random_draws: Count = 20
    """Random channel rankings of each target class: the control. A p-value is at least 1 / (draws + 1)."""
    images_per_class: Count = 50
    """At most so many images of each class of the evaluate part."""
    batch_size: Count = 256
    """Images, times conditions, that pass through the rest of the model at once."""


class VisualizationSection(Section):
    """Mode maps and galleries."""

    layers: tuple[str, ...] = ("*",)
    """Layer keys of the store, or globs over them."""
    quantities: tuple[str, ...] = ("contribution-positive",)
    """Quantities whose SAE modes are drawn."""
    modes: Count = 6
    """Modes per layer and quantity that are drawn."""
    images: Count = 6
    """Images per mode, those that load highest on it."""
    channels: Count = 3
    """Top channels of the mode that the map follows."""
    median_filter: Annotated[int, Field(ge=0)] = 4
    """Width in pixels of the median filter at an input of 224 (scaled to other sizes); 0 or 1: none."""
    contrast: Positive = 7.0
    """Factor on the map before it is clipped to [0, 1]."""


class TrackingSection(Section):
    """Where numbers are logged, beside metrics.jsonl."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """W&B mode; `offline` needs no account and never asks for one."""
    project: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]*$")] = "codec_dist"
    """W&B project; WANDB_PROJECT does not replace it, except in a sweep."""
    entity: str | None = None
    """W&B user or team; default: WANDB_ENTITY, or the account's own."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """Tags of the W&B runs."""
    per_sae: Literal["auto", "always", "never"] = "auto"
    """A W&B run for each SAE, written when training ends; `auto`: for a sweep (several SAEs of one architecture)."""


class ReportSection(Section):
    """The HTML report."""

    title: str | None = None
    """Heading of the page; default: the run's name."""
    modes: Count = 6
    """Modes shown per layer."""


class Config(Section):
    """All settings of a run. Sections that do not concern a stage may differ without redoing it."""

    run: RunSection
    data: DataSection
    model: ModelSection
    attribution: AttributionSection = AttributionSection()
    store: StoreSection = StoreSection()
    cluster: ClusterSection = ClusterSection()
    sae: SaeSection = SaeSection()
    modes: ModesSection = ModesSection()
    interventions: InterventionsSection = InterventionsSection()
    visualization: VisualizationSection = VisualizationSection()
    tracking: TrackingSection = TrackingSection()
    report: ReportSection = ReportSection()

    @property
    def store_location(self) -> str:
        """Folder or URL of the run's store."""
        return self.store.location or str(Path(self.run.directory) / "store")
