"""What can be checked of the cluster's files without a cluster: structure, versions that agree, commands that parse."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.common.cli import parse_config
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = sorted((CLUSTER / "vm").glob("*.yaml"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def rayjob() -> ModuleType:
    return load_script("rayjob")


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found
    return found[1]


def ray_cluster() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "kuberay" / "raycluster.yaml").read_text())


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def commands(document: str) -> list[list[str]]:
    """The commands in a page's fenced blocks; both ends of a pipe, and ``$(…)`` as a word."""
    found = []
    for language, block in FENCED.findall((ROOT / document).read_text()):
        if language:
            continue
        text = re.sub(r'"?\$\([^)]*\)"?', "WORD", block.replace("\\\n", " "))
        for line in text.splitlines():
            part: list[str] = []
            for word in [*shlex.split(line, comments=True), "|"]:
                if word in ("|", "&&"):
                    found.append(part)
                    part = []
                else:
                    part.append(word)
    return [part for part in found if part]


PAGES = ("README.md", "cluster/README.md", "docs/EVALUATION.md", "docs/BENCHMARKS.md")
COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def parse_job(words: list[str]) -> None:
    script, *flags = words
    assert (ROOT / script).is_file(), script
    job = Path(script).stem
    if job == "demo":
        return
    module = importlib.import_module(f"pipelines.{job}")
    parse_config(getattr(module, rayjob().JOBS[job]), flags)


def test_shared_cluster_names_the_locked_ray() -> None:
    spec = ray_cluster()["spec"]
    assert spec["rayVersion"] == locked("ray")
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{locked('ray')}-py311" in dockerfile
    assert "requirements.lock" in dockerfile


def test_every_file_names_one_image_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = set()
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            images |= set(re.findall(r"[\w.$/-]*/tinysam:[\w.-]+", path.read_text()))
    assert images == {f"REGISTRY/tinysam:{version}"}


def test_requests_equal_limits_and_pods_are_never_restarted_in_place() -> None:
    spec = ray_cluster()["spec"]
    resources = [spec["autoscalerOptions"]["resources"]]
    for group in groups(spec):
        pod = group["template"]["spec"]
        assert "restartPolicy" not in pod  # KubeRay's autoscaler v2 insists on its own
        resources += [container["resources"] for container in pod["containers"]]
    for path in (CLUSTER / "kuberay").glob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] == "Deployment":
                resources += [
                    container["resources"] for container in document["spec"]["template"]["spec"]["containers"]
                ]
    for found in resources:
        assert found["requests"] == found["limits"]
        assert {"cpu", "memory"} <= set(found["limits"])


def test_head_runs_no_tasks_and_workers_start_from_nothing() -> None:
    spec = ray_cluster()["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]


def test_every_ray_pod_has_shared_memory_larger_than_its_object_store() -> None:
    units = {"Mi": 2**20, "Gi": 2**30}
    for group in groups(ray_cluster()["spec"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        [mount] = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        size = volume["emptyDir"]["sizeLimit"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert int(size[:-2]) * units[size[-2:]] > int(group["rayStartParams"]["object-store-memory"])


def test_gpu_groups_differ_in_where_they_may_run() -> None:
    found = {group["groupName"]: group["template"]["spec"] for group in ray_cluster()["spec"]["workerGroupSpecs"]}
    assert set(found) == {"cpu", "gpu", "gpu-spot"}
    for name in ("gpu", "gpu-spot"):
        assert found[name]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "nvidia.com/gpu" in {toleration["key"] for toleration in found[name]["tolerations"]}

    def terms(name: str) -> list[list[tuple[str, str]]]:
        affinity = found[name]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        return [
            [(rule["key"], rule["operator"]) for rule in term["matchExpressions"]]
            for term in affinity["nodeSelectorTerms"]
        ]

    [on_demand] = terms("gpu")  # rules of one term must all hold; of several terms, one
    spot = [rule for [rule] in terms("gpu-spot")]
    assert {key for key, _ in on_demand} == {key for key, _ in spot}
    assert {operator for _, operator in on_demand} == {"NotIn"}
    assert {operator for _, operator in spot} == {"In"}


def test_secrets_are_named_and_never_written() -> None:
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            assert not re.search(r"AKIA[0-9A-Z]{16}|kind: Secret|requirepass \w", path.read_text()), path
    created = {command[4] for _, command in COMMANDS if command[:4] == ["kubectl", "create", "secret", "generic"]}
    named = set(re.findall(r"(?:secretRef|secretKeyRef): \{name: ([\w-]+)", _text("kuberay/*.yaml")))
    assert named == created


def _text(pattern: str) -> str:
    return "\n".join(path.read_text() for path in CLUSTER.glob(pattern))


def test_redis_is_where_the_head_looks_for_it() -> None:
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay" / "redis.yaml").read_text()))
    [service] = [document for document in documents if document["kind"] == "Service"]
    [deployment] = [document for document in documents if document["kind"] == "Deployment"]
    options = ray_cluster()["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    [variable] = pod["spec"]["containers"][0]["env"]
    assert variable["valueFrom"] == options["redisPassword"]["valueFrom"]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launcher_files_keep_to_rays_schema(path: Path) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert all(kind.get("min_workers", 0) == 0 for kind in types.values())
    assert {kind["resources"].get("GPU") for kind in types.values()} == {None, 1}
    # Without the token on every machine, whoever reaches the head's port could run programs there.
    [(inside, _)] = config["file_mounts"].items()
    assert {"--env RAY_AUTH_MODE=token", f"--env RAY_AUTH_TOKEN_PATH={inside}"} <= set(config["docker"]["run_options"])


def test_runtime_environment_is_one_that_ray_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.runtime_env import RuntimeEnv

    monkeypatch.chdir(ROOT)
    environment = RuntimeEnv(**yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text()))
    assert f"ray=={locked('ray')}" in environment["uv"]["packages"]


def test_what_is_left_at_home_is_nothing_that_a_job_reads() -> None:
    left = (ROOT / ".rayignore").read_text().split()
    assert "/tests/" in left
    assert not {"/pipelines/", "/tinysam/"} & set(left)
    assert not any(pattern.strip("/") in ("pipelines", "tinysam", "*") for pattern in left)


@pytest.mark.parametrize("job", ["cache_teacher", "distill", "quantize", "label_images", "evaluate"])
def test_the_page_shows_how_to_submit_each_job(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = [command for _, command in COMMANDS if command[:2] == ["python", "scripts/rayjob.py"] and job in command]
    assert found
    for command in found:
        assert rayjob().main(command[2:]) == 0
        manifest = yaml.safe_load(capsys.readouterr().out)
        assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
        python, *words = shlex.split(manifest["spec"]["entrypoint"])
        assert python == "python"
        parse_job(words)
        assert words[1:] == command[command.index(job) + 1 :]


def test_own_cluster_is_tried_again_and_shut_down_and_a_shared_one_is_left_alone() -> None:
    cluster = ray_cluster()
    own = rayjob().make_rayjob("label_images", ["--lake", "a b"], cluster)["spec"]
    assert shlex.split(own["entrypoint"])[-1] == "a b"
    assert own["backoffLimit"] > 0
    assert own["shutdownAfterJobFinishes"] is True
    assert own["rayClusterSpec"]["workerGroupSpecs"] == cluster["spec"]["workerGroupSpecs"]
    shared = rayjob().make_rayjob("label_images", [], cluster, shared="tinysam")["spec"]
    assert shared["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert not {"backoffLimit", "shutdownAfterJobFinishes", "rayClusterSpec"} & set(shared)


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        (["label_images", "--lake", "a", "--output", "b", "--device", "cuda"], "--num-workers"),
        (["label_images", "--lake", "a", "--output", "b", "--num-workers", "4"], "--device"),
        (["distill", "--cache", "a", "--output", "b", "--use-gpu", "True"], "--num-workers"),
        (["distill", "--cache", "a", "--output", "b", "--num-workers", "2"], "--use-gpu"),
    ],
)
def test_flags_that_a_running_cluster_would_answer_are_asked_for(
    flags: list[str], missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        rayjob().main(flags)
    assert missing in capsys.readouterr().err.splitlines()[-1]


def test_lifecycle_rules_end_unfinished_uploads() -> None:
    [rule] = json.loads((CLUSTER / "storage" / "s3-lifecycle.json").read_text())["Rules"]
    assert (rule["Status"], rule["AbortIncompleteMultipartUpload"]) == ("Enabled", {"DaysAfterInitiation": 1})
    [rule] = json.loads((CLUSTER / "storage" / "gcs-lifecycle.json").read_text())["rule"]
    assert (rule["action"]["type"], rule["condition"]) == ("AbortIncompleteMultipartUpload", {"age": 1})


def test_dashboard_shows_metrics_that_the_jobs_have() -> None:
    dashboard = json.loads((CLUSTER / "monitoring" / "grafana-dashboard.json").read_text())
    shown = set(re.findall(r"\bray_(tinysam_\w+)", json.dumps(dashboard)))
    source = (ROOT / "pipelines" / "common" / "metrics.py").read_text()
    kinds = {name: kind for kind, name in re.findall(r"(Counter|Histogram|Gauge)\(\s*\"(tinysam_\w+)\"", source)}
    assert kinds
    suffix = {"Counter": "_total", "Histogram": "_bucket", "Gauge": ""}
    assert shown == {name + suffix[kind] for name, kind in kinds.items()}
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers))


def test_prometheus_reads_the_port_that_the_pods_name() -> None:
    monitor = yaml.safe_load((CLUSTER / "monitoring" / "podmonitor.yaml").read_text())
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for group in groups(ray_cluster()["spec"]):
        [container] = group["template"]["spec"]["containers"]
        assert endpoint["port"] in {port["name"] for port in container["ports"]}


def job_command(command: list[str]) -> list[str] | None:
    """The job's script and flags, where a command runs or submits one."""
    for position, word in enumerate(command):
        if re.fullmatch(r"pipelines/\w+\.py", word):
            return command[position:]
    return None


@pytest.mark.parametrize(
    "command",
    [command for _, command in COMMANDS if job_command(command) and "..." not in command and "…" not in command],
    ids=" ".join,
)
def test_commands_of_the_pages_are_ones_that_their_job_accepts(command: list[str]) -> None:
    words = job_command(command)
    assert words is not None
    if "NAME.py" not in words[0]:
        parse_job(words)


def test_commands_of_the_pages_begin_with_programs_that_are_meant() -> None:
    known = {"python", "ray", "kubectl", "docker", "aws", "gcloud", "make", "tinysam", "cluster/local.sh"}
    for _, command in COMMANDS:
        words = iter(command)
        program = next(word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word))
        assert program in known, command


def files_named(command: list[str]) -> Iterator[str]:
    for word in command:
        if found := re.search(r"(?:^|=|//)((?:cluster|scripts|pipelines)/[\w./-]+)", word):
            yield found[1]


def test_files_that_the_pages_name_exist() -> None:
    named = {path for page, command in COMMANDS for path in files_named(command) if "NAME" not in path}
    assert "cluster/kuberay/raycluster.yaml" in named
    assert all((ROOT / path).exists() for path in named)
    page = (CLUSTER / "README.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (CLUSTER / link).exists(), link


@pytest.mark.parametrize(
    "command", [command for _, command in COMMANDS if command and command[0] == "tinysam"], ids=" ".join
)
def test_tinysam_commands_of_the_pages_parse(command: list[str]) -> None:
    from tinysam.cli import build_parser

    build_parser().parse_args(command[1:])


def test_ray_commands_of_the_pages_have_flags_that_ray_knows() -> None:
    from ray.scripts.scripts import cli

    for _, command in COMMANDS:
        while command and re.fullmatch(r"[A-Z_]+=\S*", command[0]):
            command = command[1:]
        if command[0] != "ray":
            continue
        group, words = cli, command[1:]
        while words and hasattr(group, "commands") and words[0] in group.commands:
            group, words = group.commands[words[0]], words[1:]
        assert not hasattr(group, "commands"), command
        known = {option for parameter in group.params for option in [*parameter.opts, *parameter.secondary_opts]}
        words = words[: words.index("--")] if "--" in words else words
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known, command


def test_local_cluster_explains_itself() -> None:
    script = CLUSTER / "local.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    shown = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert "cluster/local.sh pipelines/label_images.py" in shown.stderr
