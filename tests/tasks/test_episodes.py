"""The form of an evaluation on disk."""

from hpc_cpd.evaluation.rollouts import EpisodeResult, evaluation_json, task_record
from hpc_cpd.settings import EvaluationSettings


def test_evaluation_json_has_the_agreed_form() -> None:
    results = [EpisodeResult(0, 0, True, 4.0, 30, 30), EpisodeResult(1, 1, False, 2.0, None, 500)]
    settings = EvaluationSettings.model_validate({"episodes": 2, "seed": 5})
    record = task_record(results)
    assert evaluation_json(2, settings, {"metaworld/reach-v3": record}) == {
        "stage": 2,
        "episodes_per_task": 2,
        "seed": 5,
        "tasks": {
            "metaworld/reach-v3": {
                "successes": 1,
                "episodes": 2,
                "goals": 2,
                "mean_return": 3.0,
                "mean_steps_to_success": 30.0,
            }
        },
    }
    assert task_record(results[1:])["mean_steps_to_success"] is None
