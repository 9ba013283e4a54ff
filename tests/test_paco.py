"""PaCo, the momentum copy and the queue: the loss against loops, and the state after each step."""

import collections
import copy
import math
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import yaml
from crashes import crash, differing, weights
from tiny import Tiny, batches, previous_run
from torch import nn

from mbib_timm.data.batch import Batch
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS, Facts
from mbib_timm.methods.paco import NO_LABEL, MomentumCopy, Projected, Queue, paco_loss
from mbib_timm.options import build_options
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.training import train
from mbib_timm.training.optimization import Precision, create_optimizer, create_schedule, round_learning_rates
from mbib_timm.training.step import create_step

CPU = torch.device("cpu")
COUNTS = np.array([500, 120, 40, 9, 3])


def paco(seed=0, **settings):
    kind = METHODS["paco"]
    built = build_options(kind.Settings, {"queue": 20, "features": 6, **settings}, "method 'paco'")
    torch.manual_seed(seed)
    method = kind(kind.build_network(built, lambda: Tiny(5)), built, Facts(COUNTS, 10), CPU)
    method.train()
    return method


def two_views(sizes=(8, 8, 5), **kwargs):
    return batches(sizes, views=2, **kwargs)


def stepper(method):
    recipe = Recipe(method="ce", model="resnet18", opt="momentum", lr=0.05)
    method.freeze_all_but("all", None)
    optimizer = create_optimizer(recipe, method)
    round_learning_rates(optimizer)
    return create_step(recipe, method, optimizer, Precision(None, None))


# The loss


def of_three_classes(alpha=0.01, present=(True, True, True)):
    counts = torch.tensor([500.0, 50, 5], dtype=torch.float64)
    return paco_loss(
        torch.tensor([[2.0, 1, -1]], dtype=torch.float64),
        torch.tensor([[0.5, -0.2, 0.1]], dtype=torch.float64),
        torch.tensor([2]),
        present=torch.tensor([present]),
        positive=torch.tensor([[True, False, True]]),
        log_prior=(counts / counts.sum()).log(),
        alpha=alpha,
        beta=1.0,
        gamma=1.0,
    ).item()


def test_paco_on_three_classes():
    """The numbers were computed elsewhere."""
    assert of_three_classes() == pytest.approx(7.940939, abs=1e-6)
    assert of_three_classes(alpha=0) == pytest.approx(8.058773, abs=1e-6)  # samples stay in the denominator
    assert of_three_classes(present=(False, False, False)) == pytest.approx(7.641778, abs=1e-6)  # BSCE


def naive_paco(logits, queries, keys, queue, queue_labels, targets, counts, settings):
    """Image by image, in Python's own float64."""
    total = 0.0
    for i, (row, y) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        candidates = [(queries[j], targets[j]) for j in range(len(targets)) if j != i]
        candidates += [(keys[j], targets[j]) for j in range(len(targets))]
        candidates += [(f, label) for f, label in zip(queue, queue_labels, strict=True) if label != NO_LABEL]
        terms, weights, denominator = [], [], 0.0
        for k, z in enumerate(row):
            terms.append(z + math.log(counts[k] / sum(counts)))
            weights.append(settings.beta if k == y else 0.0)
            denominator += math.exp(terms[-1])
        for feature, label in candidates:
            dot = sum(a * b for a, b in zip(queries[i].tolist(), feature.tolist(), strict=True))
            terms.append(dot / settings.temperature)
            weights.append(settings.alpha if label == y else 0.0)
            denominator += settings.gamma * math.exp(terms[-1])
        inner = sum(w * (t - math.log(denominator)) for w, t in zip(weights, terms, strict=True))
        total -= inner / sum(weights)
    return total / len(targets)


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 0.3, "beta": 0.5, "gamma": 0.7, "temperature": 0.5}, {"gamma": 0.0, "alpha": 0.0}]
)
def test_a_step_computes_the_loss_written_out_over_other_queries_keys_and_the_queue(settings):
    method = paco(**settings).double()
    for number, (batch,) in enumerate(two_views((8, 8, 5, 8))):
        batch = batch._replace(views=tuple(view.double() for view in batch.views))
        network, key = copy.deepcopy(method.trainable_module), copy.deepcopy(method.key.network)
        features, labels = method.queue.features.clone(), method.queue.labels.clone()
        assert (labels == NO_LABEL).sum() == max(0, 20 - [0, 8, 16, 21][number])
        logits, queries = network(batch.views[0])
        keys = key(batch.views[1])[1]
        torch.testing.assert_close(queries.norm(dim=1), torch.ones(len(queries), dtype=torch.float64))
        expected = naive_paco(logits, queries, keys, features, labels, batch.targets, COUNTS.tolist(), method.settings)
        parts = method(batch)
        assert parts["loss"].item() == pytest.approx(expected, rel=1e-6)
        bsce = F.cross_entropy(logits + torch.tensor(COUNTS).log(), batch.targets)
        assert parts["bsce"].item() == pytest.approx(bsce.item(), rel=1e-6)
        assert not parts["bsce"].requires_grad
        # Only now are the keys in the queue, and no query ever is.
        newest = method.queue.features[(method.queue.pointer - len(keys) + torch.arange(len(keys))) % 20]
        torch.testing.assert_close(newest, keys)
        assert not method.queue.features.requires_grad
        parts["loss"].backward()
        with torch.no_grad():
            for parameter in method.trainable_module.parameters():  # so that queries and keys differ
                parameter.add_(0.1 * torch.randn_like(parameter))
        method.after_step()
    if settings.get("alpha") == 0:  # and no sample in the denominator
        assert parts["loss"].item() == pytest.approx(bsce.item(), rel=1e-6)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    similarities = torch.randn(3, 7, dtype=torch.float64, generator=generator).requires_grad_()
    present = torch.rand(3, 7, generator=generator) < 0.7
    positive = torch.rand(3, 7, generator=generator) < 0.4
    constants = dict(log_prior=torch.tensor(COUNTS / COUNTS.sum()).log(), alpha=0.2, beta=0.8, gamma=0.5)

    def loss(z, s):
        return paco_loss(z, s, torch.tensor([4, 0, 2]), present=present, positive=positive, **constants)

    assert torch.autograd.gradcheck(loss, [logits, similarities])
    loss(logits, similarities).backward()
    assert not similarities.grad[~present].any()


def test_gradients_reach_the_network_through_queries_on_both_sides_and_never_the_keys():
    method = paco()
    for (batch,) in two_views((8, 8)):
        method(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.trainable_module.parameters())
    assert all(p.grad is None and not p.requires_grad for p in method.key.parameters())
    queries = F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    (queries @ queries.T).tril(-1).sum().backward()
    assert queries.grad[0].abs().sum() > 0  # the first only ever is a sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_stay_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0]], dtype=dtype, requires_grad=True)
    similarities = torch.tensor([[20.0, -20.0]], requires_grad=True)
    masks = dict(present=torch.tensor([[True, False]]), positive=torch.tensor([[False, True]]))
    constants = dict(log_prior=torch.zeros(3), alpha=0.01, beta=1.0, gamma=1.0)
    loss = paco_loss(logits, similarities, torch.tensor([1]), **masks, **constants)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert similarities.grad.isfinite().all()


def test_projections_and_the_loss_are_float32_inside_autocast():
    method = paco()
    ((batch,),) = two_views((8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, projected = method.trainable_module(batch.images)
        loss = method(batch)["loss"]
    assert logits.dtype == torch.bfloat16
    assert projected.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(8))


# The projector


def test_the_projector_has_the_published_size_and_is_not_published():
    network = METHODS["paco"].build_network(METHODS["paco"].Settings(), lambda: timm.create_model("cifar_resnet32"))
    assert sum(p.numel() for p in network.projector.parameters()) == 6_368
    method = METHODS["paco"](network, METHODS["paco"].Settings(), Facts(50 * np.arange(100, 0, -1), 1), CPU)
    assert method.get_eval_model() is network.model
    assert sum(p.numel() for p in method.result_model().parameters()) == 470_004
    state = method.get_checkpoint_state()
    assert state["state_dict"].keys() == network.model.state_dict().keys()
    projector = {f"projector.{key}" for key in network.projector.state_dict()}
    assert state["task_state"]["network"].keys() == projector
    own = {f"key.network.{key}" for key in network.state_dict()}
    assert state["task_state"]["method"].keys() == own | {"queue.features", "queue.labels", "queue.pointer"}
    assert {f"key.network.model.fc.{key}" for key in ("weight", "bias")} <= own  # of its own


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("cifar_resnet20", {"classifier": "cosine", "classifier_scale": 16.0}),
        ("classic_resnet10", {}),
        ("with_classifier", {"backbone": "resnet10t"}),
        ("resnet10t", {}),
        ("mobilenetv3_small_050", {}),
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"img_size": 32}),
    ],
)
def test_any_model_of_one_classifier_gives_its_own_logits(name, keys):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **keys)
    network = Projected(model, 4).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, projected = network(images)
    torch.testing.assert_close(logits, model(images))
    assert projected.shape == (2, 4)
    assert network.no_weight_decay() == {f"model.{key}" for key in getattr(model, "no_weight_decay", set)()}
    if name.startswith("vit"):
        assert "model.pos_embed" in network.no_weight_decay() & {key for key, _ in network.named_parameters()}


# The momentum copy


def test_key_parameters_move_by_a_share_of_the_difference_and_statistics_are_the_copys_own():
    method = paco(momentum=0.999)
    step = stepper(method)
    for (batch,) in two_views():
        before = [p.double().clone() for p in method.key.network.parameters()]
        places = [p.data_ptr() for p in method.key.network.parameters()]
        step((batch,))
        after = [p.double() for p in method.trainable_module.parameters()]
        for own, old, new in zip(method.key.network.parameters(), before, after, strict=True):
            torch.testing.assert_close(own.double(), old + (1 - 0.999) * (new - old), rtol=1e-6, atol=1e-8)
        assert places == [p.data_ptr() for p in method.key.network.parameters()]
    query, key = method.get_eval_model().norm, method.key.network.model.norm
    assert key.num_batches_tracked == query.num_batches_tracked == 3
    assert not torch.allclose(key.running_mean, query.running_mean)


def test_a_copy_alone_follows_what_it_is_given():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    copied = MomentumCopy(network, 0.9)
    start = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
    copied.follow(network)
    torch.testing.assert_close(copied.network[0].weight, start + 0.1)
    copied.network[1].running_mean.fill_(3.0)
    copied.follow(network)
    assert copied.network[1].running_mean.tolist() == [3.0] * 3
    assert not copied(torch.ones(2, 2)).requires_grad


def test_key_layers_have_the_mode_of_the_networks():
    method = paco()
    method.freeze_all_but("classifier", "eval")
    method.train()
    assert method.key.network.projector.training
    assert not method.key.network.model.norm.training
    assert not method.key.network.projector[1].training
    method.eval()
    assert not any(module.training for module in method.key.modules())


# The queue


@pytest.mark.parametrize("sizes", [(8, 8, 5), (1,), (7, 20, 3), (23, 2), (20,)])
def test_a_queue_holds_the_last_features_whatever_the_sizes_of_the_batches(sizes):
    queue, last = Queue(20, 3), collections.deque(maxlen=20)
    generator = torch.Generator().manual_seed(0)
    assert queue.labels.tolist() == [NO_LABEL] * 20
    places = [buffer.data_ptr() for buffer in queue.buffers()]
    for _ in range(4):
        for size in sizes:
            features = torch.randn(size, 3, generator=generator)
            labels = torch.randint(5, (size,), generator=generator)
            queue.put(features, labels)
            last.extend(zip(features.tolist(), labels.tolist(), strict=True))
            order = (queue.pointer + torch.arange(20)) % 20
            held = list(zip(queue.features[order].tolist(), queue.labels[order].tolist(), strict=True))
            empty = 20 - len(last)
            assert held[empty:] == list(last)
            assert all(label == NO_LABEL for _, label in held[:empty])
    assert places == [buffer.data_ptr() for buffer in queue.buffers()]


# Runs on the digits


@pytest.mark.slow
def test_an_interrupted_run_on_the_digits_resumes_bit_identically(tmp_path):
    keys = dict(
        base="digits", model="cifar_resnet20", method={"name": "paco", "queue": 100}, imbalance_max=48, epochs=3,
        warmup_epochs=1, device="cpu", workers=0, checkpoint_seconds=0, val_interval=3, model_ema=True,
        model_ema_decay=0.5, output=str(tmp_path),
    )  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(keys))
    recipe = load_recipe(tmp_path / "own.yaml")
    whole = train(recipe, "whole")
    crash(recipe, "broken", 2)
    resumed = train(recipe.replace(resume="auto"), "broken")
    assert whole.record.result == resumed.record.result
    states = [torch.load(run.folder / "last.ckpt", weights_only=True) for run in (whole, resumed)]
    for part in ("network", "method"):
        one, other = (state["task_state"][part] for state in states)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    queue = states[0]["task_state"]["method"]["queue.labels"]
    assert (queue != NO_LABEL).all()  # 152 images an epoch
    assert not differing(whole.folder, resumed.folder)
    assert weights(whole.folder).keys() == timm.create_model("cifar_resnet20", num_classes=10).state_dict().keys()
    # Of the query network; beside it the key network's, of its own momentum.
    average, key = states[0]["state_dict_ema"], states[0]["task_state"]["method"]
    assert states[0]["task_state_ema"]["network"].keys() == states[0]["task_state"]["network"].keys()
    assert not torch.equal(average["conv1.weight"], key["key.network.model.conv1.weight"])


def test_the_packaged_recipes():
    cifar = load_recipe(find_recipe("cifar_resnet32.paco_cifar100_lt_if100"))
    published = {"alpha": 0.01, "beta": 1.0, "gamma": 1.0, "temperature": 0.05, "queue": 1024, "momentum": 0.999}
    assert cifar.method == {"name": "paco", **published, "features": 32}
    assert (cifar.epochs, cifar.lr, cifar.batch_size, cifar.weight_decay) == (400, 0.05, 128, 5e-4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cifar.lr)
    schedule, rates = create_schedule(cifar, optimizer), []
    for epoch in range(400):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch + 1)
    decays = [0.1 ** sum(e >= m for m in (320, 360)) for e in range(400)]
    assert rates == pytest.approx([0.05 * min((e + 1) / 10, 1) * decay for e, decay in enumerate(decays)])
    assert load_recipe(find_recipe("cifar_resnet32.paco_digits")).method["queue"] < 467


# What cannot be


def test_networks_and_queues_that_do_not_fit_are_refused():
    kind = METHODS["paco"]

    def build(model):
        kind.build_network(kind.Settings(), lambda: model)

    with pytest.raises(MbibError, match=r"on the features of one classifier; this model has 4: v1, v2, v3, z\. Use"):
        build(timm.create_model("mbib_resnet20"))
    with pytest.raises(MbibError, match="needs a model of one classifier; VisionTransformerDistilled has several"):
        build(timm.create_model("deit_tiny_distilled_patch16_224"))
    with pytest.raises(MbibError, match="needs a timm model; Linear has no forward_features"):
        build(nn.Linear(2, 2))
    with pytest.raises(
        MbibError, match=r"'queue' of method 'paco': expected at most the number of training images, 672, got"
    ):
        paco(queue=673)
    paco(queue=672)


# Two processes


def in_two_processes(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    method = paco(seed=0)
    method.freeze_all_but("all", None)
    method.prepare_distributed()
    step = stepper(method)
    keys = []
    original = method.queue.put
    method.queue.put = lambda features, labels: (keys.append((features.clone(), labels)), original(features, labels))
    method.start_epoch(0)
    for streams in two_views((8, 5), seed=rank):
        step(streams)
    before = [buffer.clone() for buffer in method.key.network.buffers()]
    method.synchronize()
    after = [buffer.clone() for buffer in method.key.network.buffers()]
    # A table of teachers' logits: each process looks at every second image; the second image is broken, and the third
    # takes its place.
    kind = METHODS["dive"]
    settings = kind.Settings(teacher=[f"{folder}/teacher"], teacher_pass="once")
    dive = kind(Tiny(5), settings, Facts(np.array([2, 2, 1, 1, 1]), 1), CPU)
    images, index = (
        torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 2, 2, 3, 4, 5, 6]),
    )
    share = index[rank::2]
    dive.begin(type("Passes", (), {"train": [Batch((images[share],), torch.zeros_like(share), share)]}))
    state = dict(keys=keys, queue=method.queue.state_dict(), key=[*method.key.parameters()], before=before, after=after)
    torch.save({**state, "table": dive.table, "expected": dive.teachers(images)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_queue_and_the_table(tmp_path):
    shutil.copytree(previous_run(5), tmp_path / "teacher")
    mp.start_processes(in_two_processes, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    features = torch.cat([run["keys"][i][0] for i in (0, 1) for run in (first, second)])[-20:]
    labels = torch.cat([run["keys"][i][1] for i in (0, 1) for run in (first, second)])[-20:]
    for run in (first, second):
        order = (run["queue"]["pointer"] + torch.arange(20)) % 20
        assert torch.equal(run["queue"]["features"][order], features)
        assert torch.equal(run["queue"]["labels"][order], labels)
    assert not torch.equal(first["keys"][0][0], second["keys"][0][0])
    assert all(torch.equal(one, other) for one, other in zip(first["key"], second["key"], strict=True))
    # Each has seen images of its own; from the next epoch on all have the first one's statistics.
    assert not all(torch.equal(one, other) for one, other in zip(first["before"], second["before"], strict=True))
    for run in (first, second):
        assert all(torch.equal(one, other) for one, other in zip(run["after"], first["before"], strict=True))
        seen = [0, 2, 3, 4, 5, 6]
        torch.testing.assert_close(run["table"][seen], run["expected"][seen])
        assert not run["table"][1].any()


def test_layer_decay_needs_a_network_whose_layers_are_known():
    """The projection around PaCo's model hides them from timm, which would put all parameters into one group."""
    method = paco(seed=0)
    method.freeze_all_but("all", None)
    with pytest.raises(MbibError, match="'layer_decay': method 'paco' trains a network whose layers are not known"):
        create_optimizer(Recipe(method="paco", model="cifar_resnet20", layer_decay=0.5), method)
