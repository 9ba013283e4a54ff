"""The workflows of continuous integration and of a release, without the service that runs them."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mbib_timm

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path):
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_hash_with_their_version_beside_it(path):
    lines = [line.strip() for line in path.read_text().splitlines() if "uses:" in line]
    assert len(lines) == sum("uses" in step for step in steps(path)) > 0
    for line in lines:
        assert re.fullmatch(r"(- )?uses: [\w-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_has_one_version_everywhere():
    versions = {}
    for path in WORKFLOWS:
        for action, version in re.findall(r"uses: (\S+)@(.*)", path.read_text()):
            versions.setdefault(action, set()).add(version)
    assert all(len(found) == 1 for found in versions.values()), versions


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_job_may_only_read_unless_it_says_why(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        allowed = {"id-token": "write"} if (path.stem, name) == ("release", "publish") else None
        assert job.get("permissions") == allowed, name
        assert job["timeout-minutes"] <= 60


@pytest.mark.parametrize(
    ("tag", "right"),
    [(f"v{mbib_timm.__version__}", True), (mbib_timm.__version__, False), (f"v{mbib_timm.__version__}.1", False)],
)
def test_a_release_is_the_version_that_its_tag_names(tag, right):
    [check] = [step["run"] for step in steps(ROOT / ".github" / "workflows" / "release.yml") if "REF_NAME" in str(step)]
    done = subprocess.run(["bash", "-e", "-c", check], cwd=ROOT, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"})
    assert (done.returncode == 0) is right


def test_only_the_files_that_were_checked_are_published():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    commands = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert commands.index("python -m build") < commands.index("twine check --strict dist/*")


def required(key):
    """The strings of a list in pyproject.toml; Python 3.10 cannot read TOML."""
    text = (ROOT / "pyproject.toml").read_text()
    [block] = re.findall(rf"^{key} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'^ +"(.*)",$', block, re.MULTILINE)


def test_the_lowest_versions_are_the_lower_bounds_of_all_that_the_package_needs():
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    pinned = {name: Version(version) for name, version in (line.split("==") for line in lines if line[0] != "#")}
    bounds = {}
    for requirement in map(Requirement, required("dependencies")):
        [bound] = [each.version for each in requirement.specifier if each.operator == ">="]
        bounds[requirement.name] = Version(bound)
    assert pinned == bounds


def test_the_oldest_python_runs_the_lowest_versions_and_all_that_are_named_lie_between_those_that_run():
    text = (ROOT / "pyproject.toml").read_text()
    rows = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["checks"]["strategy"]
    run = [(Version(row["python"]), row["versions"]) for row in rows["matrix"]["include"]]
    oldest = Version(re.search(r'^requires-python = ">=(.*)"$', text, re.MULTILINE)[1])
    assert min(run) == (oldest, "lowest")
    assert max(run)[1] == "newest"
    named = [Version(version) for version in re.findall(r"Python :: (3\.\d+)\"", text)]
    assert named == [Version(f"3.{minor}") for minor in range(oldest.minor, named[-1].minor + 1)]
    assert named[-1] <= max(run)[0]


def test_only_known_versions_are_asked_for():
    done = subprocess.run(["bash", str(ROOT / ".ci" / "run"), "oldest"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unknown versions 'oldest': expected lowest or newest" in done.stderr
