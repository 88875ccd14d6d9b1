"""The settings of version 1 that have another name or place today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SLURM = (
    "partition stage_partition account qos constraint gres nodes_per_stage gpus_per_node cpus_per_rank "
    "stage_cpus_per_rank memory_per_cpu time_limit_minutes signal_seconds_before_end array_parallelism mpi_plugin "
    "network_interface setup options continuation chain_length"
)
_PPO = (
    "iterations num_envs rollout_steps epochs minibatches learning_rate discount gae_lambda clip_range "
    "value_coefficient entropy_coefficient max_gradient_norm target_kl reward_scale"
)
_ENCODER = "size window width gradient_steps windows_per_task learning_rate temperature"
_CLONING = "folder episodes action_noise gradient_steps batch_size learning_rate"
_CONTRASTIVE, _SCRATCH = " where student.task_embedding is contrastive", " where teachers.start is scratch"
_TRAINED, _CLONED = " where teachers.source is train", " where teachers.start is demonstrations"


def _moved(old: str, new: str, keys: str, where: str = "") -> dict[str, str]:
    """Keys that moved together from one group to another, all under their names."""
    return {f"{old}.{key}": f"{new}.{key}{where}" for key in keys.split()}


FORMER_KEYS = {
    **_moved("memory", "method.memory", "budget_fraction selection"),
    "student.grow": "method.growth (false is now method.growth: null)",
    "student.experts_per_task": "method.experts_per_task",
    "student.gate_bias_at_birth": "method.growth.initial_gate_bias",
    "distill.newborn_coefficient": "method.growth.new_expert_routing_coefficient",
    "distill.freeze_old": "method.growth.freeze_old_experts",
    "distill.freeze_shared": "method.freeze_shared_layers",
    "distill.replay_fraction": "method.replay_fraction",
    "distill.anchor_fraction": "method.self_distillation.fraction (0 is now method.self_distillation: null)",
    "distill.between_fraction": "method.self_distillation.interpolation_fraction",
    "distill.relabelled_episodes": "method.dagger.episodes (0 is now method.dagger: null)",
    "distill.phase3_steps": "method.dagger.steps",
    "distill.penalty": "method (method: {name: ewc, coefficient: 100}; also online_ewc, l2, mas)",
    "distill.penalty_coefficient": "method.coefficient",
    "distill.online_ewc_decay": "method.decay (method: {name: online_ewc, decay: 0.95})",
    "distill.isolation": "method (method: packnet, or lora)",
    "distill.lora_rank": "method.rank (method: {name: lora, rank: 8})",
    "distill.gradient_projection": "method (true is now method: a_gem)",
    "distill.replay_targets": "method (past_student is now method: clonex)",
    "distill.patience_seconds": "distill.collective_timeout_seconds",
    **_moved("student", "student.backbone", "layers mixtures heads"),
    **_moved("student.task_encoder", "student.task_embedding", _ENCODER, _CONTRASTIVE),
    "teachers.student": "teachers.source.folder where teachers.source is student",
    "teachers.hidden": "teachers.algorithm.hidden",
    "teachers.evaluation_episodes": f"teachers.source.evaluation_episodes{_TRAINED}",
    "teachers.evaluate_every_iterations": f"teachers.source.evaluate_every_rounds{_TRAINED}",
    "teachers.target_success": f"teachers.source.target_success{_TRAINED}",
    **_moved("teachers.demonstrations", "teachers.start", _CLONING, _CLONED),
    "teachers.ppo.warm_log_std": f"teachers.start.initial_log_std{_CLONED}",
    "teachers.ppo.warm_learning_rate": f"teachers.start.policy_learning_rate{_CLONED}",
    "teachers.ppo.warm_value_iterations": f"teachers.start.critic_only_rounds{_CLONED}",
    **_moved("teachers.ppo", "teachers.start", "initial_log_std smallest_std desired_kl", _SCRATCH),
    **_moved("teachers.ppo", "teachers.algorithm", _PPO),
    **_moved("cluster", "cluster.scheduler", _SLURM),
}
"""Former dotted key -> today's, and in words where it depends on the value, or on which plug-in is chosen."""


def former_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Those keys in nested `values` that are former ones, dotted, in the order of `values`."""
    found = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in FORMER_KEYS:
            found.append(key)
        elif isinstance(value, Mapping):
            found += former_keys(value, f"{key}.")
    return found


def advice(keys: list[str]) -> str:
    """One sentence about what the first three of `keys`, former ones, are today."""
    first = "; ".join(f"setting '{key}' is now {FORMER_KEYS[key]}" for key in keys[:3])
    more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{first}{more}; the table is in CHANGELOG.md"
