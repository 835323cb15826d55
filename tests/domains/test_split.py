from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depgraph import DepgraphError
from domains import DomainData, Sample, leave_one_out


def make_data(stems: dict[str, dict[str, list[str]]]) -> DomainData:
    classes = tuple(sorted({name for by_class in stems.values() for name in by_class}))
    samples = {
        domain: tuple(
            Sample(Path("root", domain, name, f"{stem}.png"), label)
            for label, name in enumerate(classes)
            for stem in by_class[name]
        )
        for domain, by_class in stems.items()
    }
    return DomainData(Path("root"), classes, samples)


# A set of stems as the bits of a number: quick to make, and at least five of them.
stem_lists = st.integers(0, 2**25 - 1).map(
    lambda bits: [f"s{i}" for i in range(30) if i < 5 or bits >> (i - 5) & 1]
)
datasets = st.fixed_dictionaries(
    {domain: st.fixed_dictionaries({"cat": stem_lists, "dog": stem_lists}) for domain in "abct"}
)
several = settings(max_examples=40, deadline=None)
ways = st.sampled_from(["image", "stem"])


@several
@given(datasets, ways, st.integers(0, 100))
def test_each_source_is_parted_in_two_and_the_target_is_all_test(stems, way, seed):
    data = make_data(stems)
    split = leave_one_out(data, "t", seed=seed, split_by=way)
    assert split.sources == ("a", "b", "c")
    assert split.test == data.samples["t"]
    for name in split.sources:
        assert Counter(split.train[name] + split.val[name]) == Counter(data.samples[name])


@several
@given(datasets, st.integers(0, 100), st.floats(0.1, 0.9))
def test_by_image_each_class_of_each_domain_has_its_exact_share(stems, seed, share):
    split = leave_one_out(make_data(stems), "t", seed=seed, val_share=share)
    for name in split.sources:
        for label, of_class in enumerate(("cat", "dog")):
            size = len(stems[name][of_class])
            count = sum(sample.label == label for sample in split.val[name])
            assert count == min(max(1, round(share * size)), size - 1)


@several
@given(datasets, st.integers(0, 100))
def test_by_stem_a_stem_is_on_one_side_in_all_sources(stems, seed):
    split = leave_one_out(make_data(stems), "t", seed=seed, split_by="stem")
    train, val = (
        {(s.label, s.path.stem) for part in side.values() for s in part}
        for side in (split.train, split.val)
    )
    assert not train & val


def test_by_stem_shared_stems_give_every_domain_the_same_exact_share():
    names = {"cat": [f"x{i}" for i in range(50)], "dog": [f"y{i}" for i in range(25)]}
    split = leave_one_out(make_data(dict.fromkeys("abct", names)), "t", split_by="stem")
    for name in split.sources:
        assert Counter(sample.label for sample in split.val[name]) == {0: 10, 1: 5}


def test_by_stem_domains_with_nothing_in_common_still_get_their_share_each():
    stems = {d: {c: [f"{d}{i}" for i in range(20)] for c in ("cat", "dog")} for d in "abct"}
    split = leave_one_out(make_data(stems), "t", split_by="stem")
    assert {name: len(part) for name, part in split.val.items()} == dict.fromkeys("abc", 8)


def test_by_stem_the_file_ending_does_not_matter():
    data = make_data({d: {c: [str(i) for i in range(9)] for c in ("u", "v")} for d in "abt"})
    data.samples["b"] = tuple(
        Sample(s.path.with_suffix(".jpg"), s.label) for s in data.samples["b"]
    )
    split = leave_one_out(data, "t", split_by="stem")
    a, b = ([(s.label, s.path.stem) for s in split.val[name]] for name in "ab")
    assert a == b


@several
@given(datasets, ways, st.randoms())
def test_neither_file_order_nor_the_place_of_the_folder_nor_the_target_matters(stems, way, rnd):
    data = make_data(stems)
    moved = {}
    for name, samples in rnd.sample(list(data.samples.items()), 4):
        shuffled = [Sample(Path("/elsewhere") / s.path, s.label) for s in samples if name != "t"]
        rnd.shuffle(shuffled)
        moved[name] = tuple(shuffled)
    split = leave_one_out(data, "t", split_by=way)
    other = leave_one_out(DomainData(Path("x"), data.classes, moved), "t", split_by=way)
    for name in split.sources:
        assert {(s.label, s.path.name) for s in split.val[name]} == {
            (s.label, s.path.name) for s in other.val[name]
        }


FROZEN = [(0, "2"), (0, "5"), (1, "4"), (1, "7")]


def test_the_split_is_the_same_on_every_machine():
    data = make_data({d: {c: [str(i) for i in range(10)] for c in ("u", "v")} for d in "abt"})
    split = leave_one_out(data, "t", seed=3, split_by="stem")
    assert [(s.label, s.path.stem) for s in split.val["a"]] == FROZEN


def test_another_seed_gives_another_split(data):
    first, second = (leave_one_out(data, "photo", seed=seed) for seed in (0, 1))
    assert first.val != second.val


def test_an_unknown_target_is_refused_with_near_names(data):
    with pytest.raises(DepgraphError, match=r"'photos'.*did you mean photo\?"):
        leave_one_out(data, "photos")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_a_share_outside_0_to_1_is_refused(data, share):
    with pytest.raises(DepgraphError, match="val_share"):
        leave_one_out(data, "photo", val_share=share)


def test_an_unknown_way_to_split_is_refused(data):
    with pytest.raises(DepgraphError, match="'image' or 'stem'"):
        leave_one_out(data, "photo", split_by="class")


def test_a_target_alone_is_refused():
    data = make_data({"t": {"u": ["1", "2"], "v": ["1", "2"]}})
    with pytest.raises(DepgraphError, match="no domain but the target 't'"):
        leave_one_out(data, "t")


def test_a_source_too_small_for_two_sides_is_named():
    data = make_data({d: {"u": ["1"], "v": ["1"]} for d in "at"})
    with pytest.raises(DepgraphError, match="source domain 'a' has no image left for validation"):
        leave_one_out(data, "t")
