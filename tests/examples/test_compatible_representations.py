"""The retrieval example: its measures, the distances that adapters keep, and what it writes."""

import json
import math

import compatible_representations as compatible
import numpy as np
import pytest
from compatible_representations import fit, retrieval

RADIUS = 1.5


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return compatible.Options(
        smoke=True, progress=False, output=tmp_path_factory.mktemp("out"), **compatible.SMOKE
    )


@pytest.fixture(scope="module")
def world(options):
    return compatible.make_world(options)


@pytest.fixture(scope="module")
def before(world):
    return world.old.copy(), world.new.copy()


@pytest.fixture(scope="module")
def compared(options, world, before):
    return compatible.compare(options, world)


@pytest.fixture(scope="module")
def lines(compared):
    return {line.name: line for line in compared[0]}


@pytest.fixture(scope="module")
def fits(lines):
    names = {"affine": "affine", "orthogonal": "orthogonal", "λ": f"λ = {RADIUS:g}"}
    return {kind: lines[name].fitted for kind, name in names.items()}


def brute_force_retrieval(queries, gallery, labels):
    """Top-1 and average precision of each query, by loops."""
    top1, precisions = [], []
    for i, query in enumerate(queries):
        others = [j for j in range(len(labels)) if j != i]
        cosine = {
            j: query @ gallery[j] / np.linalg.norm(query) / np.linalg.norm(gallery[j])
            for j in others
        }
        ranked = sorted(others, key=lambda j: -cosine[j])
        found, terms = 0, []
        for rank, j in enumerate(ranked, start=1):
            if labels[j] == labels[i]:
                found += 1
                terms.append(found / rank)
        top1.append(100.0 * (labels[ranked[0]] == labels[i]))
        precisions.append(100.0 * sum(terms) / len(terms))
    return np.array(top1), np.array(precisions)


# ------------------------------------------------------------------------------------- measures


def test_retrieval_by_hand():
    angles = np.deg2rad([0.0, 10.0, 25.0, 90.0])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    labels = np.array([0, 1, 0, 1])
    # 0 finds 1 (wrong), 2 (right), 3; 1 finds 0, 2 (wrong), 3 (right); 2 finds 1, 0 (right), 3;
    # 3 finds 2, 1 (right), 0. Found itself, each would be right at once.
    top1, precision = retrieval(features, features, labels)
    np.testing.assert_array_equal(top1, [0, 0, 0, 0])
    np.testing.assert_allclose(precision, [100 / 2, 100 / 3, 100 / 2, 100 / 2])
    # Of the gallery with 1 moved to 80 degrees: 0 and 2 find each other, 3 finds 1.
    angles[1] = np.deg2rad(80.0)
    moved = 5 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    top1, precision = retrieval(features, moved, labels)
    np.testing.assert_array_equal(top1, [100, 0, 100, 100])
    np.testing.assert_allclose(precision, [100, 100 / 3, 100, 100])


def test_retrieval_is_that_of_loops():
    generator = np.random.default_rng(0)
    queries, gallery = generator.standard_normal((2, 3, 40, 4))
    labels = np.arange(40) % 3
    found = retrieval(queries, gallery, labels)
    for seed in range(3):
        expected = brute_force_retrieval(queries[seed], gallery[seed], labels)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[seed], theirs)


def test_queries_of_each_kind_search_the_gallery_they_are_said_to(options, world, fits):
    images = world.report[:80]
    labels = world.labels[images]
    features = compatible.adapt(fits["λ"].adapter, world.new)
    found = compatible.evaluate(world, features, images)
    for seed in range(options.seeds):
        own, old = features[seed, images], world.old[seed, images]
        in_old, in_own = (brute_force_retrieval(own, g, labels) for g in (old, own))
        for i, measure in enumerate(("top1", "map")):
            expected = {
                "known_in_old": in_old[i][labels < 5],
                "all_in_old": in_old[i],
                "known_in_own": in_own[i][labels < 5],
                "held_out_in_own": in_own[i][labels >= 5],
            }
            for name, values in expected.items():
                ours = found[f"{name}_{measure}"][seed]
                assert ours == pytest.approx(values.mean(), abs=1e-3)


def test_the_loss_is_distance_and_contrast():
    generator = np.random.default_rng(0)
    new, old = generator.standard_normal((2, 6, 4))
    adapter = {"kernel": generator.standard_normal((4, 4)), "bias": generator.standard_normal(4)}
    labels = np.array([0, 1, 2, 0, 1, 0])
    adapted = new @ adapter["kernel"] + adapter["bias"]
    expected = np.mean(np.sum((adapted - old) ** 2, axis=1))
    for i in range(6):
        scores = [a @ adapted[i] / np.linalg.norm(a) / np.linalg.norm(adapted[i]) for a in old]
        weights = np.exp(np.array(scores) / 0.1)
        logs = np.log(weights / weights.sum())
        expected -= 0.5 * logs[labels == labels[i]].mean() / 6
    options = compatible.Options(contrastive=0.5, temperature=0.1)
    loss = compatible.adapter_loss(adapter, new, old, labels, options)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------- world


def test_images_are_split_and_adapters_see_known_classes_for_training_only(world):
    parts = [set(part.tolist()) for part in (world.train, world.select, world.report)]
    assert [len(part) for part in parts] == [797, 400, 600]
    assert len(set.union(*parts)) == 1797
    assert set(world.fit.ravel().tolist()) <= parts[0]
    assert set(world.labels[world.fit].ravel().tolist()) == {0, 1, 2, 3, 4}
    assert not np.array_equal(world.fit[0], world.fit[1])


def test_the_new_model_is_better_and_incompatible(lines):
    old, new = lines["old"].report, lines["new"].report
    for name in ("known_in_own_map", "held_out_in_own_map", "class_mean"):
        assert np.all(new[name] > old[name] + 5), name
    assert np.all(new["known_in_old_map"] < 40)
    np.testing.assert_array_equal(old["known_in_own_map"], old["known_in_old_map"])


# ------------------------------------------------------------------------------------- adapters


def test_each_map_keeps_its_distance_from_orthogonality(fits):
    assert np.all(fits["orthogonal"].distance < 1e-4)
    assert np.all(fits["λ"].distance < RADIUS)
    assert np.all(fits["λ"].distance > 0.5)  # used, not refused
    assert np.all(fits["affine"].distance > 3 * RADIUS)


@pytest.mark.parametrize("kind", ["affine", "orthogonal", "λ"])
def test_distances_in_the_optimizers_state_are_those_of_the_kernel(options, fits, kind):
    fitted = fits[kind]
    w = fitted.adapter["kernel"].astype(np.float64)
    exact = np.linalg.norm(w.mT @ w - np.eye(options.width), axis=(-2, -1))
    np.testing.assert_allclose(fitted.distance, exact, atol=1e-5, rtol=1e-5)
    assert fitted.distances.shape == (options.seeds, options.steps)
    np.testing.assert_array_equal(fitted.distances[:, 0], 0)  # from the identity
    np.testing.assert_allclose(fitted.distances[:, -1], exact, atol=0.05)  # one update before
    # The first step of Adam changes each entry by the learning rate; the orthogonal one, of those
    # that are not zero in the tangent space.
    length = math.sqrt(options.width) * options.learning_rate
    np.testing.assert_allclose(fitted.ratios[:, 0], length, rtol=0.1)


def test_the_losses_fall_and_the_less_constrained_fall_further(fits):
    for fitted in fits.values():
        assert np.all(fitted.losses[:, -1] < fitted.losses[:, 0] - 1.5)
    last = {kind: fitted.losses[:, -1] for kind, fitted in fits.items()}
    assert np.all(last["affine"] < last["λ"] - 0.02)
    assert np.all(last["λ"] < last["orthogonal"] - 0.02)


def test_adapters_find_in_the_old_gallery(lines):
    for name in ("orthogonal", "λ = 1.5", "affine"):
        found, unadapted = lines[name].report, lines["new"].report
        assert np.all(found["known_in_old_map"] > unadapted["known_in_old_map"] + 20)


def test_without_its_bias_the_orthogonal_map_changes_nothing_among_new_features(world, lines, fits):
    unadapted = lines["new"].report
    rotated = {
        kind: compatible.evaluate(world, world.new @ fits[kind].adapter["kernel"], world.report)
        for kind in ("orthogonal", "affine")
    }
    name = "held_out_in_own_map"
    np.testing.assert_allclose(rotated["orthogonal"][name], unadapted[name], atol=0.05)
    assert np.all(rotated["affine"][name] < unadapted[name] - 5)


def test_a_penalty_without_strength_leaves_the_affine_map(options, world, fits):
    free = fit(options, world, "λ", RADIUS, strength=0.0)
    np.testing.assert_allclose(free.adapter["kernel"], fits["affine"].adapter["kernel"], atol=1e-3)


def test_the_frozen_features_do_not_change(world, before, fits):
    del fits  # they were fitted in between
    for now, then in zip((world.old, world.new), before, strict=True):
        np.testing.assert_array_equal(now, then)
        np.testing.assert_allclose(np.linalg.norm(now, axis=-1), 1, rtol=1e-5)


# -------------------------------------------------------------------------------------- results


def test_the_least_strength_that_holds_every_radius_is_chosen():
    escaped, held, tight = {1.0: 0.9, 2.0: 3.0}, {1.0: 1.05, 2.0: 1.9}, {1.0: 0.5, 2.0: 1.5}
    assert compatible.choose_strength({1.0: tight, 0.01: escaped, 0.1: held}) == 0.1
    assert compatible.choose_strength({0.01: escaped, 0.02: {1.0: 1.0, 2.0: 2.5}}) == 0.02


def line(name, family, kept, gained, selected=None):
    report = {compatible.KEPT: np.array(kept), compatible.GAINED: np.array(gained)}
    kept, gained = selected or (kept, gained)
    select = {compatible.KEPT: np.array(kept), compatible.GAINED: np.array(gained)}
    return compatible.Line(name, family, None, None, report, select)


def test_the_height_above_the_front_and_the_choice():
    ends = [
        line("orthogonal", "orthogonal", [90.0, 80.0], [60.0, 70.0]),
        line("affine", "affine", [50.0, 60.0], [80.0, 80.0]),
    ]
    middle = line("middle", "λ", [70.0, 65.0], [70.0, 79.0], selected=([90.0], [60.0]))
    lines = [*ends, middle, line("other", "λ", [90.0], [90.0], selected=([70.0], [79.0]))]
    np.testing.assert_allclose(compatible.above_front(middle, lines), [0.0, 1.5])
    assert compatible.best_of(lines, "λ").name == "middle"  # by `select`, not by `report`


def test_the_smoke_run_prints_a_table_and_writes_data_and_picture(
    options, world, compared, monkeypatch, capsys
):
    monkeypatch.setattr(compatible, "make_world", lambda _: world)  # made above, as it makes them
    monkeypatch.setattr(compatible, "compare", lambda *_: compared)
    lines = compatible.main(options)
    printed = capsys.readouterr().out
    names = ["old", "new", "orthogonal", "λ = 0", "λ = 1.5", "affine"]
    assert [line.name for line in lines] == names
    table = [row for row in printed.splitlines() if row.startswith("|")]
    assert len(table) == 2 + len(names) and len(set(map(len, table))) == 1
    assert all(row.startswith(f"| {n} ") for n, row in zip(names, table[2:], strict=True))
    data = json.loads((options.output / "compatible_representations.json").read_text())
    assert [line["name"] for line in data["lines"]] == names
    assert data["options"]["steps"] == 600 and data["strength"] == 0.1
    for line in data["lines"]:
        assert all(math.isfinite(x) for found in line["report"].values() for x in found)
        assert (line["fitted"] is None) == (line["name"] in ("old", "new"))
    assert max(data["lines"][2]["fitted"]["distances"]) < 1e-4  # orthogonal all the way
    assert (options.output / "compatible_representations.png").stat().st_size > 10_000
