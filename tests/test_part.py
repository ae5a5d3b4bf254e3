"""A part of the tests leaves out no function and no row, and over time no test."""

import part

pytest_plugins = "pytester"

# 30 functions of 40 rows, as many functions of one test, and one of few.
CLAUSES = {f"clause_{i}[{j}]": [f"clause_{i}", f"row_{j}"] for i in range(30) for j in range(40)}
SINGLE = {f"test_{i}": [f"test_{i}"] for i in range(30)}
TESTS = {**CLAUSES, **SINGLE, **{f"few[{i}]": ["few"] for i in range(3)}}


def test_every_group_is_met_in_every_turn():
    for turn in range(20):
        met = {group for name in part.choose(TESTS, 8, turn) for group in TESTS[name]}
        assert met == {group for groups in TESTS.values() for group in groups}


def test_about_one_in_eight_is_met_and_all_of_them_are_in_one_part():
    for turn in range(20):
        chosen = part.choose(CLAUSES, 8, turn)
        assert len(CLAUSES) / 12 < len(chosen) < len(CLAUSES) / 6
    assert part.choose(TESTS, 1, "") == set(TESTS)


def test_of_a_small_group_that_all_hashes_miss_one_is_met_and_not_always_the_same():
    met = [part.choose({f"few[{i}]": ["few"] for i in range(3)}, 1e9, turn) for turn in range(40)]
    assert all(len(chosen) == 1 for chosen in met)
    assert len(set.union(*met)) == 3


def test_the_turn_alone_decides_and_every_test_has_its_turn():
    assert part.choose(TESTS, 8, "a") == part.choose(dict(reversed(TESTS.items())), 8, "a")
    assert part.choose(TESTS, 8, "a") != part.choose(TESTS, 8, "b")
    assert set.union(*(part.choose(TESTS, 8, turn) for turn in range(100))) == set(TESTS)


def test_pytest_runs_those_that_the_rule_chooses(pytester):
    pytester.makeini("[pytest]\nmarkers = in_every_part: is never left out")
    pytester.makepyfile(
        """
        import collections
        import pytest

        Case = collections.namedtuple("Case", "name")

        @pytest.mark.parametrize("case", [Case(f"row {i}") for i in range(50)], ids=str)
        def test_a_clause(case):
            pass

        @pytest.mark.in_every_part
        @pytest.mark.parametrize("i", range(9))
        def test_a_whole(i):
            pass

        @pytest.mark.parametrize("i", range(99))
        def test_a_function(i):
            pass
        """
    )
    result = pytester.runpytest_inprocess("--part=1000000", "--turn=a", plugins=[part])
    result.stdout.fnmatch_lines(["*--turn=a*"])
    result.assert_outcomes(passed=50 + 9 + 1, deselected=98)
