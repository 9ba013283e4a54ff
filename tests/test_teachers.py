"""Frozen teachers and DiVE: what teaches, that it never changes, and the loss against its equation written out."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from crashes import crash, differing, weights
from tiny import Tiny, batches, previous_run

from mbib_timm.data.batch import Batch
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.methods import METHODS, Facts, resolve_method
from mbib_timm.methods.teacher import Renormalized
from mbib_timm.models.weights import load_model
from mbib_timm.options import build_options
from mbib_timm.publishing.release import make_release
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.results.redact import redact_command
from mbib_timm.training import run as run_module
from mbib_timm.training import train

CPU = torch.device("cpu")
COUNTS = np.array([500, 120, 40, 9, 3])
FEW = np.array([500, 50, 5])
SHORT = dict(
    base="digits", model="cifar_resnet20", imbalance_max=24, epochs=2, warmup_epochs=1, device="cpu", workers=0,
    checkpoint_seconds=0, val_interval=2,
)  # fmt: skip
BSCE_DIVE = [{"method": "bsce"}, {"method": "dive"}]


def dive(counts=COUNTS, heads=("logits",), facts=None, **settings):
    kind = METHODS["dive"]
    facts = facts or Facts(counts, 10, previous_run(len(counts)))
    torch.manual_seed(0)
    return kind(Tiny(len(counts), heads), build_options(kind.Settings, settings, "method 'dive'"), facts, CPU)


def recipe_of(tmp_path, stages=None, name="own", **keys):
    (tmp_path / "recipes").mkdir(parents=True, exist_ok=True)
    path = tmp_path / "recipes" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**SHORT, **({"stages": stages} if stages else {}), **keys}))
    return load_recipe(path, {"output": str(tmp_path / "runs")})


def softmax(row):
    exponentials = [math.exp(z) for z in row]
    return [e / sum(exponentials) for e in exponentials]


def naive_dive(teacher, logits, targets, counts, temperature, power, alpha):
    """The loss of one head, image by image, with the power taken of probabilities, as the paper has it."""
    total = 0.0
    for t, z, y in zip(teacher.tolist(), logits.tolist(), targets.tolist(), strict=True):
        raised = [p**power for p in softmax([v / temperature for v in t])]
        wanted = [p / sum(raised) for p in raised]
        found = softmax([v / temperature for v in z])
        divergence = sum(p * math.log(p / q) for p, q in zip(wanted, found, strict=True))
        bsce = -math.log(softmax([v + math.log(n) for v, n in zip(z, counts, strict=True)])[y])
        total += alpha * temperature**2 * divergence + (1 - alpha) * bsce
    return total / len(targets)


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The loss


def test_dive_on_three_classes():
    """The numbers were computed elsewhere."""
    teacher = torch.tensor([[3.0, 1, 0]], dtype=torch.float64)
    student = torch.tensor([[[2.0, 1, -1]]], dtype=torch.float64)
    parts = dive(FEW).double().distill(teacher, student, torch.tensor([2]))
    found = {name: value.item() for name, value in parts.items()}
    assert found == pytest.approx({"loss": 3.906305, "divergence": 0.042708, "bsce": 7.641778}, abs=1e-6)
    assert next(iter(parts)) == "loss"
    wanted = [p**0.5 for p in softmax([1.5, 0.5, 0.0])]
    assert [p / sum(wanted) for p in wanted] == pytest.approx([0.481024, 0.291756, 0.227220], abs=1e-6)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "power": 1.0, "alpha": 0.2}])
def test_dive_is_its_equation_written_out_and_the_mean_over_the_heads(heads, settings):
    teacher, student = random_logits(6, 5), random_logits(heads, 6, 5, seed=1)
    targets = torch.randint(5, (6,), generator=torch.Generator().manual_seed(2))
    constants = {"temperature": 2.0, "power": 0.5, "alpha": 0.5, **settings}
    expected = [naive_dive(teacher, z, targets, COUNTS, **constants) for z in student]
    loss = dive(**settings).double().distill(teacher, student, targets)["loss"]
    assert loss.item() == pytest.approx(sum(expected) / heads, rel=1e-6)


def test_gradients_agree_with_finite_differences_and_reach_the_student_alone():
    method = dive().double()
    teacher, student = random_logits(4, 5).requires_grad_(), random_logits(2, 4, 5, seed=1).requires_grad_()
    targets = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(lambda z: method.distill(teacher, z, targets)["loss"], [student])
    method.distill(teacher, student, targets)["loss"].backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_the_loss_is_float32_inside_autocast():
    teacher, student, targets = random_logits(4, 5).float(), random_logits(1, 4, 5).float(), torch.arange(4)
    method = dive()
    outside = method.distill(teacher, student, targets)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.distill(teacher, student, targets)["loss"]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_a_step_takes_the_teachers_prediction_of_the_students_images():
    method = dive(heads=("v1", "z"))
    method.train()
    ((batch,),) = batches((8,), size=16)
    teacher = load_model(str(previous_run(5))).module(batch.images)
    student = torch.stack([*method.logits(batch.images).values()])
    expected = method.distill(teacher, student, batch.targets)
    assert torch.equal(method(batch)["loss"], expected["loss"])


# Several teachers, other normalisation, published names


def test_several_teachers_teach_the_mean_of_their_logits():
    folders = [previous_run(5, seed=seed) for seed in (0, 1, 2)]
    method = dive(teacher=[str(folder) for folder in folders])
    images = batches((4,), size=16)[0][0].images
    each = [load_model(str(folder)).module(images) for folder in folders]
    torch.testing.assert_close(method.teachers(images), sum(each) / 3)
    assert not torch.allclose(each[0], each[1])


def images_facts(size=(3, 16, 16), mean=(0.31,) * 3, std=(0.35,) * 3, previous=None, **more):
    return Facts(COUNTS, 10, previous, size, mean, std, **more)


def test_images_are_normalised_again_for_a_teacher_of_other_constants():
    own = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    method = dive(facts=images_facts(previous=previous_run(5, **own)))
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = (pixels - torch.tensor(own["mean"]).view(3, 1, 1)) / torch.tensor(own["std"]).view(3, 1, 1)
    expected = load_model(str(previous_run(5, **own))).module(theirs)
    torch.testing.assert_close(method.teachers((pixels - 0.31) / 0.35), expected, rtol=1e-4, atol=1e-4)
    alike = dive(facts=images_facts(previous=previous_run(5, mean=(0.31,) * 3, std=(0.35,) * 3)))
    assert not any(isinstance(module, Renormalized) for module in alike.teachers.modules())


def test_a_grey_students_images_are_normalised_by_one_number():
    grey = images_facts(size=(1, 16, 16), mean=(0.2, 0.4, 0.6), std=(0.5,))
    imagenets = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    folder = previous_run(5, size=(1, 16, 16), **imagenets)
    (renormalized,) = dive(facts=grey._replace(previous=folder)).teachers.models
    assert renormalized.scale.item() == pytest.approx(0.5 / 0.226, rel=1e-6)  # 0.226: the mean of ImageNet's
    assert renormalized.shift.item() == pytest.approx((0.4 - 0.449) / 0.226, rel=1e-6)


def test_a_published_model_teaches():
    facts = Facts(np.arange(100, 0, -1), 1, None, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    name = "mbib_resnet32.cifar100_lt_if100"
    method = dive(np.arange(100, 0, -1), facts=facts, teacher=[name])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(method.teachers(images), timm.create_model(name, pretrained=True).eval()(images).detach())


# Frozen


def test_a_teacher_stays_as_it_is_whatever_the_method_does():
    method = dive()
    before = {key: value.clone() for key, value in method.teachers.models.state_dict().items()}
    assert before.keys() == load_model(str(previous_run(5))).module.state_dict(prefix="0.").keys()
    optimizer = torch.optim.SGD([p for _, p in method.trainable_parameters()], lr=0.1, weight_decay=0.1)
    for mode in (True, False, True):
        method.train(mode)
        assert not any(module.training for module in method.teachers.modules())
    for streams in batches((8, 8, 5)):
        method(*streams)["loss"].backward()
        optimizer.step()
    after = method.teachers.models.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    teachers = {id(p) for p in method.teachers.parameters()}
    assert not teachers & {id(p) for _, p in method.trainable_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in method.teachers.parameters())


def test_a_checkpoint_holds_no_teacher_and_another_teacher_is_not_taken_for_it():
    method = dive()
    state = method.get_checkpoint_state()
    assert state["state_dict"].keys() == Tiny().state_dict().keys()
    assert state["task_state"]["method"].keys() == {"teachers.digest"}
    assert state["task_state"]["method"]["teachers.digest"].numel() == 32
    dive().load_checkpoint_state(state["state_dict"], state["task_state"])
    other = dive(facts=Facts(COUNTS, 10, previous_run(5, seed=1)))
    with pytest.raises(RuntimeError, match="the teachers' weights differ from those that training began with"):
        other.load_checkpoint_state(state["state_dict"], state["task_state"])


# Once for all images


class Passes:
    """Training images in order, in batches of four."""

    def __init__(self, images):
        index = torch.arange(len(images)).split(4)
        self.train = [Batch((images[each],), torch.zeros_like(each), each) for each in index]


def test_a_table_of_logits_is_the_teachers_evaluation_of_the_same_images():
    counts = np.array([6, 3, 2, 1, 1])
    images = torch.randn(13, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    method = dive(counts, teacher_pass="once")
    method.begin(Passes(images))
    with torch.no_grad():
        expected = load_model(str(previous_run(5))).module(images)
    torch.testing.assert_close(method.table, expected)
    assert not method.table.requires_grad
    index = torch.tensor([12, 0, 5, 5])
    augmented = Batch((torch.zeros(4, 3, 16, 16),), torch.tensor([4, 0, 0, 0]), index)
    assert torch.equal(method.teacher_logits(augmented), method.table[index])
    assert "table" not in method.get_task_state()["method"]
    every_step = dive(counts)
    every_step.begin(Passes(images))
    assert every_step.table is None


def test_a_table_of_images_that_are_never_the_same_is_refused():
    facts = images_facts(mixed=True)
    message = r"'once' needs the same images in every epoch, but the recipe mixes images; use teacher_pass: step"
    with pytest.raises(MbibError, match=message):
        dive(facts=facts._replace(previous=previous_run(5)), teacher_pass="once")
    dive(facts=facts._replace(previous=previous_run(5)))


def test_a_table_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("mbib_timm.methods.teacher.fits", lambda needed, device: needed < 4 * 672 * 5)
    with pytest.raises(MbibError, match=r"the logits of 672 images, 5 each, take 0\.0 GB, which do not fit onto cpu"):
        dive(teacher_pass="once")
    dive(counts=COUNTS - 1, teacher_pass="once")


# Runs


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    path = tmp_path_factory.mktemp("taught")
    return path, train(recipe_of(path, BSCE_DIVE), "whole")


@pytest.mark.slow
def test_the_stage_before_teaches_a_student_that_starts_anew(taught, tmp_path, monkeypatch):
    folder = taught[1].folder
    assert taught[1].record.stages == ["bsce", "dive"]
    assert "train_divergence" in (folder / "summary.csv").read_text().splitlines()[0]
    seen, original = [], run_module.create_step

    def create_step(recipe, method, *args):
        seen.append((method, {key: value.clone() for key, value in method.get_eval_model().state_dict().items()}))
        return original(recipe, method, *args)

    monkeypatch.setattr(run_module, "create_step", create_step)
    # Another teacher of the same kind, and a student that is none of its kind.
    train(recipe_of(tmp_path, [{"method": "bsce", "lr": 0.01}, {"method": "dive"}]), "same")
    train(
        recipe_of(
            tmp_path, [{"method": "mbib", "model": "mbib_resnet20"}, {"method": "dive", "model": "cifar_resnet20"}]
        ),
        "other",
    )
    (_, first), (one, start), _, (other, begin) = seen
    assert all(torch.equal(start[key], begin[key]) for key in start), "the seed alone decides"
    assert not torch.equal(first["conv1.weight"], start["conv1.weight"])
    before = weights(tmp_path / "runs" / "same" / "stage1-bsce")
    assert not torch.equal(before["conv1.weight"], start["conv1.weight"])
    assert all(torch.equal(value, before[key]) for key, value in one.teachers.models[0].state_dict().items())
    mbib = load_model(str(tmp_path / "runs" / "other" / "stage1-mbib")).module
    images = batches((4,), size=16)[0][0].images
    torch.testing.assert_close(other.teachers(images), mbib(images).detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_student_resumes_bit_identically(taught, tmp_path):
    stages = [{"method": "bsce"}, {"method": {"name": "dive", "teacher_pass": "once"}}]
    # The teacher is the one of the run beside.
    shutil.copytree(taught[0] / "runs" / "whole", tmp_path / "runs" / "done")
    whole = train(recipe_of(tmp_path, stages), "first")
    crash(recipe_of(tmp_path, stages), "second", 1, stage=1)
    resumed = train(recipe_of(tmp_path, stages).everywhere(resume="auto"), "second")
    assert not differing(whole.folder, resumed.folder)
    assert whole.record.result == resumed.record.result


def test_a_student_is_not_resumed_with_a_teacher_that_has_changed(taught, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(taught[0] / "runs" / "whole" / "stage1-bsce", teacher)
    recipe = recipe_of(tmp_path, method={"name": "dive", "teacher": str(teacher)})
    crash(recipe, "run", 1)
    shutil.copy(taught[0] / "runs" / "whole" / "model.safetensors", teacher)
    with pytest.raises(CheckpointError, match="does not fit: the teachers' weights differ from those"):
        train(recipe.replace(resume="auto"), "run")


def test_a_run_of_one_stage_with_a_teacher_equals_two_stages_but_for_the_stages_seed(taught, tmp_path, monkeypatch):
    """Its folder is kept as an absolute path, so that the run resumes from anywhere."""
    monkeypatch.chdir(taught[0])
    recipe = recipe_of(tmp_path, method={"name": "dive", "teacher": "runs/whole/stage1-bsce"})
    expected = [str((taught[0] / "runs" / "whole" / "stage1-bsce").resolve())]
    assert recipe.method["teacher"] == expected
    crash(recipe, "run", 1)
    monkeypatch.chdir(tmp_path)
    assert train(recipe.replace(resume="auto"), "run").record.stages == ["dive"]
    written = load_recipe(tmp_path / "runs" / "run" / "recipe.yaml")
    assert written.method["teacher"] == expected
    # Another teacher is another computation.
    other = recipe.replace(method={**recipe.method, "teacher": [str(taught[0] / "runs" / "whole")]}, resume="auto")
    with pytest.raises(CheckpointError, match="holds a run of another recipe: method"):
        train(other, "run")


def test_of_a_teachers_folder_the_name_is_published(taught, tmp_path):
    teacher = taught[0] / "runs" / "whole" / "stage1-bsce"
    names = [str(teacher), f"local-dir:{teacher}", "mbib_resnet20.digits", "hf-hub:me/model"]
    run = tmp_path / "run"
    shutil.copytree(taught[1].folder, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"][1]["method"]["teacher"] = names
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["environment"]["command"] = f"mbib train r.yaml --stage2.method.teacher '[{teacher}]'"
    (run / "metrics.json").write_text(json.dumps(metrics))
    release = make_release(run, "me/dive")
    published = yaml.safe_load(release.files["recipe.yaml"])["stages"][1]["method"]["teacher"]
    assert published == ["stage1-bsce", "stage1-bsce", "mbib_resnet20.digits", "hf-hub:me/model"]
    assert str(taught[0]).encode() not in b"".join(release.files.values())
    (tmp_path / "public.yaml").write_bytes(release.files["recipe.yaml"])
    assert load_recipe(tmp_path / "public.yaml").method["name"] == "dive"
    assert redact_command(f"mbib train r --method.teacher={teacher}") == "mbib train r --method.teacher=stage1-bsce"


def test_the_packaged_recipes_take_their_teacher_from_the_run_of_bsce():
    for data in ("digits", "cifar100_lt_if100"):
        recipe = load_recipe(find_recipe(f"cifar_resnet32.dive_{data}"))
        assert recipe.previous.computation() == load_recipe(find_recipe(f"cifar_resnet32.bsce_{data}")).computation()
        constants = {"temperature": 2.0, "power": 0.5, "alpha": 0.5, "teacher": ["previous"], "teacher_pass": "step"}
        assert recipe.method == {"name": "dive", **constants}
        assert recipe.choice("reset") == "all"
    # With two flags MBIB's run teaches.
    flags = {"stage1.method.name": "mbib", "stage1.model": "mbib_resnet32"}
    taught = load_recipe(find_recipe("cifar_resnet32.dive_cifar100_lt_if100"), flags)
    mbib = load_recipe(find_recipe("mbib_resnet32.cifar100_lt_if100"))
    assert taught.previous.computation() == mbib.computation()
    assert taught.model == "cifar_resnet32"


# What cannot be, said before anything is trained


@pytest.mark.parametrize(
    ("stages", "keys", "message"),
    [
        (None, {"method": "dive"}, r"'teacher' of method 'dive': 'previous' is the stage before, and there is none"),
        (None, {"teacher": "runs/nowhere"}, r"'teacher' of method 'dive': there is no folder runs/nowhere"),
        (None, {"teacher": "mbib_resnet32.cifar100_lt_if1000"}, r"unknown tag of a model.*did you mean"),
        (None, {"teacher": "mbib_resnet32.cifar100_lt_if100"}, r"has 100 classes, the data have 10"),
        (None, {"teacher": []}, r"expected at least one model"),
        (None, {"teacher": [3]}, r"setting 'teacher' of method 'dive': expected str, got 3"),
        (None, {"teacher_pass": "never"}, r"unknown value of setting 'teacher_pass'"),
        (BSCE_DIVE[:1], {"teacher": "here"}, r"here holds no config\.json: the run is not finished"),
        ([{"method": "bsce", "img_size": 24}, BSCE_DIVE[1]], {},
         r"previous takes images of 24 x 24 pixels in 3 channels, the student's are 16 x 16 pixels in 3 channels"),
        ([{"method": "bsce", "model_kwargs": {"in_chans": 1}}, BSCE_DIVE[1]], {},
         r"previous takes images of 16 x 16 pixels in 1 channel, the student's are 16 x 16 pixels in 3 channels"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict | list) else None,
)  # fmt: skip
def test_what_cannot_teach_stops_the_run_before_it_begins(tmp_path, monkeypatch, stages, keys, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    if not stages or len(stages) == 1:
        method = keys if "method" in keys else {"method": {"name": "dive", **keys}}
        stages, keys = ([*stages, method], {}) if stages else (None, method)
    with pytest.raises(MbibError, match=message) as caught:
        train(recipe_of(tmp_path, stages, **keys), "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_the_same_number_of_other_classes_is_refused():
    names = ("cat", "dog", "owl", "fox", "elk")
    folder = previous_run(5, names=("cat", "owl", "dog", "fox", "elk"))
    with pytest.raises(MbibError, match="has other classes than the data, or another order: 'owl' for 'dog'"):
        dive(facts=Facts(COUNTS, 10, folder, class_names=names))
    dive(facts=Facts(COUNTS, 10, folder, class_names=("cat", "owl", "dog", "fox", "elk")))
    dive(facts=Facts(COUNTS, 10, folder))


def test_one_teacher_may_be_given_as_a_list_or_alone():
    assert resolve_method({"name": "dive", "teacher": "here"}) == resolve_method({"name": "dive", "teacher": ["here"]})
    settings = METHODS["dive"].Settings
    assert {"teacher"} == {item.name for item in dataclasses.fields(settings) if item.metadata.get("place")}
