"""A site's settings live in one file that every experiment can name."""

from pathlib import Path

import pytest

from hpc_cpd.cluster.schedulers.slurm import SlurmSettings
from hpc_cpd.config import changed_keys, load_config, taken_over
from hpc_cpd.errors import UserError


def site_file(folder: Path, text: str = "partition: gpu\ncpus_per_rank: 4\n") -> Path:
    path = folder / "lab.yaml"
    path.write_text(text)
    return path


def test_a_site_file_fills_in_what_the_experiment_does_not_say(tmp_path):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(f"cluster: {{site: '{site_file(tmp_path)}', scheduler: {{cpus_per_rank: 2}}}}\n")
    cluster = load_config(experiment).cluster.scheduler
    assert isinstance(cluster, SlurmSettings)
    assert (cluster.partition, cluster.cpus_per_rank) == ("gpu", 2)


def test_a_site_named_on_the_command_line_stands_over_the_file_and_under_later_words(tmp_path):
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("cluster: {scheduler: {cpus_per_rank: 2, account: a}}\n")
    words = [f"cluster.site={site_file(tmp_path)}", "cluster.scheduler.partition=cpu"]
    cluster = load_config(experiment, words).cluster.scheduler
    assert isinstance(cluster, SlurmSettings)
    assert (cluster.partition, cluster.cpus_per_rank, cluster.account) == ("cpu", 4, "a")


def test_a_site_file_may_hold_cluster_settings_only_and_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"lab\.yaml: unknown setting 'seed'.*partition"):
        load_config(None, [f"cluster.site={site_file(tmp_path, 'seed: 1')}"])
    with pytest.raises(UserError, match="there is no site file nowhere"):
        load_config(None, ["cluster.site=nowhere.yaml"])


def test_the_documented_example_of_a_site_names_every_cluster_setting():
    example = Path(__file__).parents[1] / "configs" / "cluster" / "example.yaml"
    load_config(None, [f"cluster.site={example}"])
    for name in SlurmSettings.model_fields:
        assert f"{name}:" in example.read_text(), name


def test_a_site_file_may_name_its_scheduler_and_a_config_may_do_without_settings(tmp_path):
    local = site_file(tmp_path, "name: local\n")
    assert load_config(None, [f"cluster.site={local}"]).cluster.scheduler.name == "local"
    with pytest.raises(UserError, match=r"unknown setting 'partition'.*name"):
        load_config(None, [f"cluster.site={site_file(tmp_path, 'name: local' + chr(10) + 'partition: gpu')}"])
    assert load_config(None, ["cluster.scheduler=local"]).cluster.scheduler.name == "local"


def test_all_of_a_scheduler_may_differ_when_a_run_is_resumed():
    before, after = load_config(None), load_config(None, ["cluster.scheduler.partition=gpu"])
    assert not changed_keys(before, after) and taken_over(before, after)
    other = load_config(None, ["cluster.scheduler=local"])
    assert not changed_keys(before, other)
    assert taken_over(before, other) == ["cluster.scheduler was 'slurm' and is now 'local'"]
