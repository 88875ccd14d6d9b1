"""Every setting of a run that does not belong to a plug-in: typed, documented, validated.

Units stand in the names. A field made by :func:`resumable` says only *how* the work is done, never what comes
out, so it may differ when a run is resumed. What a plug-in alone understands stands in the plug-in's own file, in its
:class:`PluginSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, core_schema

from hpc_cpd import plugins
from hpc_cpd.errors import UserError


def resumable(default: Any, **about: Any) -> Any:
    """The field of a setting that says only *how* the work is done; `about`: as for pydantic's Field."""
    return Field(default, json_schema_extra={"resumable": True}, **about)


class Settings(BaseModel):
    """Base of every group of settings: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PluginSettings(Settings):
    """The settings of one plug-in: a subclass gives ``name: Literal["its_name"] = "its_name"`` and its own fields."""

    name: str

    def require_fit(self, group: Any) -> None:
        """Raise UserError when these settings contradict `group`, the settings among which they stand."""


@dataclass(frozen=True)
class Choice:
    """Marks a setting that names a plug-in: ``ewc``, or ``{name: ewc, coefficient: 100}``.

    The value becomes the plug-in's own ``Settings``. Without a name, as in ``{coefficient: 100}``, it is `default`.
    """

    kind: str
    default: str

    def resolve(self, value: Any) -> PluginSettings:
        """The settings that `value` means. Raises UserError: no such plug-in, or a mistake in its settings."""
        key = plugins.KINDS[self.kind].key
        if isinstance(value, PluginSettings):
            value = value.model_dump()
        given = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else None
        if given is None or not isinstance(given.setdefault("name", self.default), str):
            raise UserError(
                f"setting '{key}' must be a name, or a mapping with a name and settings, but it is {value!r}"
            )
        settings: type[PluginSettings] = plugins.load(self.kind, given["name"]).Settings
        try:
            return settings.model_validate(given)
        except ValidationError as failure:
            error = failure.errors()[0]
            raise UserError(mistake(error, settings, f"{key}.") + self._owners(error)) from None

    def _owners(self, error: Mapping[str, Any]) -> str:
        """Which built-in plug-ins have the setting that `error` calls unknown, as the end of a sentence, or empty."""
        unknown = error["loc"][0] if error["type"] == "extra_forbidden" else None
        every = ((name, plugins.load(self.kind, name)) for name in plugins.built_in(self.kind))
        owners = [name for name, plugin in every if unknown in plugin.Settings.model_fields]
        return f"; {unknown} is a setting of {', '.join(owners)}" if owners else ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.resolve,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda chosen: chosen.model_dump()),
        )


def chosen(description: str, default: str | None = None) -> Any:
    """The field of a setting that is marked with a :class:`Choice`, whose default may be another than the mark's."""
    return Field({} if default is None else default, validate_default=True, description=description)


def choice_of(settings: type[BaseModel] | None, name: str) -> Choice | None:
    """The :class:`Choice` that the field `name` is marked with; None: it is an ordinary field, or there is none."""
    field = settings.model_fields.get(name) if settings is not None else None
    return next((mark for mark in field.metadata if isinstance(mark, Choice)), None) if field is not None else None


def group_within(settings: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The group of settings that the field `name` holds, if it holds one; it may be null instead."""
    field = settings.model_fields.get(name) if settings is not None else None
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def mistake(error: Mapping[str, Any], settings: type[BaseModel], prefix: str = "") -> str:
    """One sentence for an error of pydantic in `settings`, whose keys begin with `prefix`."""
    location = [str(part) for part in error["loc"]]
    group = settings
    for part in location[:-1]:
        group = group_within(group, part) or group
    key = prefix + ".".join(location)
    if error["type"] == "extra_forbidden":
        within = prefix + "".join(f"{part}." for part in location[:-1])
        near = plugins.hint(location[-1], group.model_fields, within, (0.6, 0.3))
        return f"unknown setting '{key}'; {near}Known here: {', '.join(group.model_fields)}"
    name = next((part for part in reversed(location) if part in group.model_fields), None)
    about = f" ({group.model_fields[name].description})" if name and group.model_fields[name].description else ""
    if error["type"] == "missing":
        return f"setting '{key}'{about} has no default; write {key}=VALUE"
    text = error["msg"][0].lower() + error["msg"][1:]
    return f"setting '{key}'{about}: {text}, but it is {error['input']!r}"


THREADS = "cores that torch's products of one rank use; more are slower for small networks, and round otherwise"


class StreamSettings(Settings):
    """Which tasks arrive, and in which stages."""

    tasks: str | list[str] = Field(
        "MT10", description="a task set (MT10, MT25, MT50, or MT50x2: goals halved) or a list of task ids"
    )
    tasks_per_stage: int = Field(5, ge=0, description="tasks that arrive together; 0: all of them in one stage")
    order_seed: int | None = Field(None, description="shuffle the tasks with this seed; null keeps the list order")


class TeacherSettings(Settings):
    """Single-task experts. `algorithm` and `start` say how those are trained that ``source: train`` trains."""

    source: Annotated[PluginSettings, Choice("sources", "train")] = chosen(
        "where teachers come from: trained in the run, the zoo, a student"
    )
    algorithm: Annotated[PluginSettings, Choice("algorithms", "ppo")] = chosen("what trains a teacher")
    start: Annotated[PluginSettings, Choice("starts", "demonstrations")] = chosen("the first weights of a teacher")
    ranks: int = resumable(2, ge=1, description="MPI ranks per teacher")
    threads_per_rank: int = Field(1, ge=1, description=THREADS)


class TrajectorySettings(Settings):
    """What a teacher leaves behind."""

    episodes: int = Field(100, ge=1, description="episodes kept per task")
    action_noise: list[float] = Field(
        [0.0, 0.1, 0.3, 0.5], min_length=1, description="standard deviations of the noise, one drawn per episode"
    )
    success_only: bool = Field(True, description="drop episodes that never succeed")
    max_attempts_factor: int = Field(4, ge=1, description="give up after episodes x factor attempts")
    steps_after_success: int = Field(15, ge=0, description="an episode ends this many steps after its first success")
    episodes_per_shard: int = Field(25, ge=1, description="a shard is closed and renamed after this many episodes")


class NetworkSettings(Settings):
    """The parts and sizes of a student that stay as they are in all its stages."""

    width: int = Field(128, ge=8, description="token width")
    history: int = Field(4, ge=1, description="observations that an action may depend on, the newest included")
    expert_hidden: int = Field(256, ge=1, description="hidden width of an expert")
    shared_expert_hidden: int = Field(
        0, ge=0, description="hidden width of an expert per mixture, frozen with the backbone, for all tasks; 0: none"
    )
    experts_see_observation: bool = Field(
        True, description="experts and gate also receive the observation, so a frozen backbone loses nothing"
    )
    top_k: int = Field(0, ge=0, description="experts per token; 0 mixes all of them (dense softmax)")
    tokenizer: Annotated[PluginSettings, Choice("tokenizers", "linear")] = chosen("makes a token of an observation")
    backbone: Annotated[PluginSettings, Choice("backbones", "transformer")] = chosen(
        "makes features of the tokens of a history"
    )
    head: Annotated[PluginSettings, Choice("heads", "linear")] = chosen("makes an action of the features")

    @model_validator(mode="after")
    def _fit(self) -> Self:
        for part in (self.tokenizer, self.backbone, self.head):
            part.require_fit(self)
        return self


class StudentSettings(NetworkSettings):
    """The generalist: tokenizer, backbone, mixtures of experts that grow, head."""

    task_embedding: Annotated[PluginSettings, Choice("embeddings", "contrastive")] = chosen(
        "gives every task its vector"
    )


class DistillSettings(Settings):
    """Learning a stage."""

    ranks: int = resumable(2, ge=1, description="DeepSpeed ranks")
    threads_per_rank: int = Field(1, ge=1, description=THREADS)
    expert_parallel_size: int = resumable(0, ge=0, description="ranks that share one set of experts; 0: all of them")
    zero_stage: int = resumable(
        0,
        ge=0,
        le=2,
        description="ZeRO: 1 shares the optimizer's state over the ranks, 2 the gradients too (memory, not speed)",
    )
    batch_size: int = Field(256, ge=1, description="windows per step, over all ranks")
    phase1_steps: int = Field(2000, ge=0, description="steps with the old experts and shared layers frozen")
    phase2_steps: int = Field(2000, ge=0, description="steps with the gate frozen and the experts learning")
    learning_rate: float = Field(1e-3, gt=0, description="peak AdamW step size of each phase, cosine to 10%")
    warmup_steps: int = Field(100, ge=0, description="linear warm-up of each phase")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_gradient_norm: float = Field(1.0, gt=0, description="global gradient norm clip")
    load_balancing_coefficient: float = Field(0.001, ge=0, description="weight of the load-balancing loss")
    target: Literal["mean", "executed"] = Field(
        "mean", description="what the student imitates: the teacher's mean, or its action with noise (ablation)"
    )
    task_weights: Literal["equal", "teacher_success"] = Field(
        "equal", description="how often a task is drawn: like any other, or in proportion to its teacher's success"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the student's products while it learns; weights, gate and optimizer stay float32"
    )
    in_memory_gigabytes: float = resumable(
        8.0,
        ge=0,
        description="trajectories of a stage, and what is computed of them once, are mapped from files beyond this",
    )
    collective_timeout_seconds: float = resumable(
        45.0, gt=0, description="a rank that keeps the others waiting longer is lost"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.ranks % (self.expert_parallel_size or self.ranks):
            raise UserError(
                f"distill.expert_parallel_size is {self.expert_parallel_size}, which does not divide distill.ranks, "
                f"{self.ranks}; choose a divisor, or 0 for all of them"
            )
        return self


class EvaluationSettings(Settings):
    """How success is measured."""

    episodes: int = Field(20, ge=1, description="episodes per task, each on a goal of its own while they last")
    seed: int = Field(10_000, ge=0, le=2**32 - 3, description="seed of the evaluation goals; never the training seed")
    forward_transfer: bool = Field(True, description="also evaluate new tasks before they are learnt")
    infer_task: bool = Field(False, description="also evaluate a student that is not told its task")
    old_tasks_per_stage: int | None = Field(
        None, ge=0, description="tasks of earlier stages, drawn per stage, evaluated before the last stage; null: all"
    )


class ClusterSettings(Settings):
    """Where jobs run, and how often they are tried again."""

    scheduler: Annotated[PluginSettings, Choice("schedulers", "slurm")] = resumable(
        "slurm", validate_default=True, description="what jobs are submitted to, and what its site wants to be told"
    )
    max_retries: int = resumable(2, ge=0, description="automatic retries of a failed teacher or stage")


METHOD = Choice("methods", "ours")


class Config(Settings):
    """One experiment."""

    method: Annotated[PluginSettings, METHOD] = chosen("how a stage learns, and what is done against forgetting")

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run folder is runs/NAME")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything but the evaluation goals")
    checkpoint_every_seconds: float = resumable(20.0, gt=0, description="most work lost to a kill")
    stream: StreamSettings = StreamSettings()
    teachers: TeacherSettings = Field(default_factory=TeacherSettings)
    trajectories: TrajectorySettings = TrajectorySettings()
    student: StudentSettings = Field(default_factory=StudentSettings)
    distill: DistillSettings = DistillSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
