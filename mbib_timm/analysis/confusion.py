"""Where errors go: true shot group against predicted shot group."""

from typing import Any

import numpy as np

from mbib_timm.data.long_tail import shot_groups


def group_confusion(labels: np.ndarray, predicted: np.ndarray, class_counts: np.ndarray) -> dict[str, Any]:
    """Count the images of each true group by the group of the class that they are taken for.

    A large group draws many errors simply because it has many classes. ``even`` tells what the shares would be if the
    same number of errors were spread evenly over all other classes: more than that is attraction.

    Args:
        labels: true classes, (N,), int64.
        predicted: predicted classes, (N,), int64.
        class_counts: training images of each class, (K,).

    Returns:
        By true group: ``images``, their numbers by predicted group; ``correct``, how many are right; ``shares``, in
        percent of the group's images, of those ``correct`` and ``wrong_to_many``, ``wrong_to_medium``,
        ``wrong_to_few``; ``even``, the same with the errors spread evenly. Shares are None for a group without images.
    """
    groups = shot_groups(class_counts)
    names = list(groups)
    group_of = np.empty(len(class_counts), dtype=np.int64)
    for place, classes in enumerate(groups.values()):
        group_of[classes] = place
    counted = np.zeros((2, len(names), len(names)), dtype=np.int64)
    np.add.at(counted, ((labels == predicted).astype(np.int64), group_of[labels], group_of[predicted]), 1)
    wrong, right = counted
    result: dict[str, Any] = {"images": {}, "correct": {}, "shares": {}, "even": {}}
    for place, name in enumerate(names):
        images, correct = int((wrong + right)[place].sum()), int(right[place, place])
        result["images"][name] = dict(zip(names, (wrong + right)[place].tolist(), strict=True))
        result["correct"][name] = correct
        # Other classes that an error can go to: in its own group there is one fewer.
        others = np.array([len(classes) for classes in groups.values()]) - (np.arange(len(names)) == place)
        evenly = (images - correct) * others / max(1, others.sum())
        result["shares"][name] = _percent(names, correct, wrong[place], images)
        result["even"][name] = _percent(names, correct, evenly, images)
    return result


def _percent(names: list[str], correct: int, wrong: np.ndarray, images: int) -> dict[str, float] | None:
    if images == 0:
        return None
    shares = {f"wrong_to_{name}": float(100.0 * number / images) for name, number in zip(names, wrong, strict=True)}
    return {"correct": 100.0 * correct / images, **shares}
