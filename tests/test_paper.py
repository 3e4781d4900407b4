"""recipes/paper/check.py: every row passes, and fails when a sign is wrong in any one of the objects that it is about."""

import re
import sys

import pytest
import torch

from .test_recipes import RECIPES, refused

ONCE = {"small.D", "narrow.D", "small.lstsq_pinv.once", "narrow.lstsq_pinv.once"}
# Signs that a claim cannot see as it holds for −A as for A: projectors, kernels and symmetry, products with A in them twice,
# equations of which both sides are linear in A.
FREE_OF_SIGN = {
    "standard_flow": {"wide.short_D"},
    "rank_loss": {"twins.D"},
    "psi_tilde": {"narrow.pinv"},
    "chain": {"narrow.pinv"},
    "constrained_flow": {"narrow.short_D"},
    "first_of_family": {"twins.D"},
    "in_range": {"narrow.gradient.half"},
    "kernels": {"narrow.D", "narrow.gram_pinv", "narrow.pinv"},
    "common_equilibrium": {"twins.equilibrium.D"},
    "metric": {"small.D"},
    "ranges": {"narrow.D", "narrow.pinv"},
    "block_matrix": {"wide.D"},
    "effective_kernels": {"twins.D"},
    "third_condition": ONCE,
    "fourth_condition": ONCE,
    "one_range": ONCE,
    "one_kernel": {"narrow.D", "narrow.lstsq_pinv.once"},
    "commuting": {"narrow.D", "narrow.pinv"},
}


@pytest.fixture(scope="module")
def paper():
    """The recipe, imported as its own process imports it."""
    own = ("race", "digits", "claims", "claims_objects", "check")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name in own or name.startswith("claims_")}
    path = list(sys.path)
    sys.path.insert(0, str(RECIPES / "paper"))
    import check

    yield check
    sys.path[:] = path
    for name in [name for name in sys.modules if name in own or name.startswith("claims_")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture(scope="module")
def smoke(paper, tmp_path_factory):
    """Exit status, context and page of a run of seconds, made once."""
    contexts = []
    build = paper.build
    paper.build = lambda *arguments: contexts.append(build(*arguments)) or contexts[0]
    page = tmp_path_factory.mktemp("paper") / "paper.md"
    status = paper.main(["--smoke", "--markdown", str(page)])
    paper.build = build
    return status, contexts[0], page.read_text()


def some_flipped(value):
    """The signs of half of the entries, the largest among them."""
    signs = torch.randint(2, value.shape, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    signs.view(-1)[value.abs().argmax()] = -1
    return signs * value


def rows_with(claim, context, flip):
    """What becomes of a claim when one of the objects that it reads is another, for each of them."""
    reads = claim(context.fork({})).reads
    for name in reads:
        value = context.original(name)
        if not name.endswith(".bool") and value.abs().max() < 1e-12:
            continue  # zero has no sign
        wrong = 1 - value if name.endswith(".bool") else flip(value)
        yield name, claim(context.fork({name: wrong}))


@pytest.mark.slow
def test_every_row_passes(paper, smoke):
    status, context, _ = smoke
    rows = [claim(context.fork({})) for claim in paper.all_claims()]
    assert status == 0
    assert [row.cells for row in rows if not row.passed] == []
    assert len(rows) > 70
    assert all(row.reads for row in rows)
    said = " ".join(row.equation for row in rows)
    for number in ("(2.15)", "(2.18)", "(2.44)", "(2.60)", "(3.17)", "(4.1)", *(f"(A.{k})" for k in range(1, 13)), "Lemma A.2"):
        assert number in said
    printed = [row.equation for row in rows if "as printed" in row.equation]
    assert printed == [f"({n}), as printed" for n in ("2.49", "2.59", "2.60", "3.11")]


@pytest.mark.slow
def test_every_row_fails_when_signs_are_wrong_in_any_object(paper, smoke):
    seen = [
        (claim.find.__name__, name)
        for claim in paper.all_claims()
        for name, row in rows_with(claim, smoke[1], some_flipped)
        if row.passed
    ]
    assert seen == []


@pytest.mark.slow
def test_every_row_fails_when_the_sign_of_an_object_is_wrong(paper, smoke):
    seen = {
        (claim.find.__name__, name)
        for claim in paper.all_claims()
        for name, row in rows_with(claim, smoke[1], torch.neg)
        if row.passed
    }
    assert seen == {(claim, name) for claim, names in FREE_OF_SIGN.items() for name in names}


@pytest.mark.slow
def test_a_row_that_fails_sets_the_exit_status(paper, smoke, capsys, monkeypatch):
    wrong = smoke[1].fork({"wide.D": -smoke[1].original("wide.D")})
    monkeypatch.setattr(paper, "build", lambda *arguments: wrong)
    monkeypatch.setattr(paper, "all_claims", lambda: paper.claims_fields.CLAIMS[:4])
    assert paper.main(["--smoke"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAIL\n", out)
    assert "1 of 4 rows pass" in out


@pytest.mark.slow
def test_page(paper, smoke):
    _, _, page = smoke
    lines = page.splitlines()
    assert lines[0].startswith("# ")
    assert "`python recipes/paper/check.py --smoke`" in page
    assert "- wide: 12 images of 784 pixels, tanh MLP 784-16-16-10, QN = 120" in page
    table = [re.sub(r"\\\|", "", line) for line in lines if line.startswith("|")]
    assert len(table) == len(paper.all_claims()) + 2
    assert {line.count("|") for line in table} == {7}
    assert all(line.endswith("| pass |") for line in table[2:])


def test_bounds_that_prove_nothing_and_nan_do_not_pass(paper):
    from claims import Finding, Row

    def passed(**figures):
        return Row("(1)", "claim", Finding("way", **figures), ("object",)).passed

    assert passed(error=1e-9, bound=1e-8)
    assert not passed(error=1e-7, bound=1e-8)
    assert not passed(error=float("nan"), bound=1e-8)
    assert not passed(error=0.3, bound=0.5)
    assert not passed(error=1e-9, bound=float("nan"))
    assert passed(error=1e-9, bound=1e-8, off=2.0, amount=1.0)
    assert not passed(error=1e-9, bound=1e-8, off=0.5, amount=1.0)
    assert not passed(error=1e-7, bound=1e-8, off=2.0, amount=1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--samples", "0"), "argument --samples: should be a whole number above 0, but got '0'"),
        (("--samples", "5000"), "--samples should be at most 4000 for mnist5k, but got 5000"),
        (("--samples", "5"), "--samples should be at least 12"),
        (("--markdown", "/dev/null/x"), "--markdown /dev/null/x: there is no folder /dev/null"),
    ],
)
def test_wrong_options_give_one_clear_line(paper, capsys, arguments, words):
    line = refused(paper, capsys, *arguments)
    assert re.match(r"[\w.-]+: error: ", line)
    assert words in line
