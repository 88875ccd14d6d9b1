"""A site's settings live in one file that every experiment can name."""

from pathlib import Path

import pytest

from hpc_cpd.config import load_config
from hpc_cpd.errors import UserError
from hpc_cpd.settings import ClusterSettings


def site_file(folder: Path, text: str = "partition: gpu\ncpus_per_rank: 4\n") -> Path:
    path = folder / "lab.yaml"
    path.write_text(text)
    return path


def test_a_site_file_fills_in_what_the_experiment_does_not_say(tmp_path):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"cluster: {{site: '{site_file(tmp_path)}', cpus_per_rank: 2}}\n")
    cluster = load_config(experiment).cluster
    assert (cluster.partition, cluster.cpus_per_rank) == ("gpu", 2)


def test_a_site_named_on_the_command_line_stands_over_the_file_and_under_later_words(tmp_path):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("cluster: {cpus_per_rank: 2, account: a}\n")
    words = [f"cluster.site={site_file(tmp_path)}", "cluster.partition=cpu"]
    cluster = load_config(experiment, words).cluster
    assert (cluster.partition, cluster.cpus_per_rank, cluster.account) == ("cpu", 4, "a")


def test_a_site_file_may_hold_cluster_settings_only_and_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"lab\.yaml: unknown setting 'seed'.*partition"):
        load_config(None, [f"cluster.site={site_file(tmp_path, 'seed: 1')}"])
    with pytest.raises(UserError, match="there is no site file nowhere"):
        load_config(None, ["cluster.site=nowhere.yaml"])


def test_the_documented_example_of_a_site_names_every_cluster_setting():
    example = Path(__file__).parents[1] / "configs" / "cluster" / "example.yaml"
    load_config(None, [f"cluster.site={example}"])
    for name in ClusterSettings.model_fields:
        assert f"{name}:" in example.read_text(), name
