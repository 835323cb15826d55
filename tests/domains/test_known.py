import pytest

from domains import KNOWN
from domains.data.known import plain, recognise


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_published_counts_add_up(known):
    if None not in known.domains.values():
        assert sum(known.domains.values()) == known.total
    for domain, counts in known.per_class.items():
        assert len(counts) == len(known.classes) and sum(counts) == known.domains[domain]


def test_the_numbers_of_classes_and_domains_are_those_of_the_papers():
    sizes = {name: (len(known.classes), len(known.domains)) for name, known in KNOWN.items()}
    assert sizes == {
        "PACS": (7, 4),
        "Office-Home": (65, 4),
        "VLCS": (5, 4),
        "TerraIncognita": (10, 4),
        "DomainNet": (345, 6),
    }


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_no_two_names_differ_only_in_spelling(known):
    for names in (known.classes, known.domains):
        assert len({plain(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("data", "folder", "domain"),
    [
        ("PACS", "art_painting", "art_painting"),
        ("PACS", "Art Painting", "art_painting"),
        ("PACS", "art", "art_painting"),
        ("Office-Home", "Real World", "Real World"),
        ("Office-Home", "Real_World", "Real World"),
        ("Office-Home", "RealWorld", "Real World"),
        ("Office-Home", "Real", "Real World"),
        ("TerraIncognita", "L100", "location_100"),
        ("DomainNet", "clip", "clipart"),
        ("PACS", "watercolour", None),
    ],
)
def test_domains_are_known_by_their_usual_spellings(data, folder, domain):
    assert KNOWN[data].domain_of(folder) == domain


def test_data_sets_are_recognised_by_their_folders_even_where_some_lack():
    for name, known in KNOWN.items():
        found = recognise(list(known.domains)[1:], list(known.classes)[1:])
        assert found is not None and found.name == name


def test_another_data_set_is_not_taken_for_a_known_one():
    assert recognise(["photo", "sketch"], ["red", "green", "blue"]) is None
    assert recognise(["clay", "ink", "wool"], list(KNOWN["PACS"].classes)) is None
