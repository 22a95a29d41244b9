"""kernels/program.py: compiled once, for sizes that vary. Oracle: the functions run eagerly."""

from __future__ import annotations

import shutil

import pytest
import torch

from oxillama_torch.kernels.program import Program

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.timeout(900),
]


def blend(a_N4, b_MN, out_N4):
    """Reads its arguments in another order than they come, and writes to the last."""
    total = b_MN.sum(0)
    out_N4.copy_(a_N4 * 2 - total[:, None])
    return a_N4 + 1, total


@pytest.fixture(scope="module")
def program():
    return Program(blend, "blend", [("N", 4), ("M", "N"), ("N", 4)], options={"compile_threads": 1})


def arguments(n, m):
    return torch.randn(n, 4), torch.randn(m, n), torch.full((n, 4), torch.nan)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (7, 5), (3, 3), (1, 1), (1, 9), (1021, 13)])
def test_one_program_serves_every_size(program, n, m):
    a, b, out = arguments(n, m)
    wanted_out = out.clone()
    wanted = blend(a, b, wanted_out)
    got = program(a, b, out)
    assert isinstance(got, tuple)
    for x, y in zip((*got, out), (*wanted, wanted_out)):
        torch.testing.assert_close(x, y)
    assert len(program._by_threads) == 1


def test_parts_of_larger_tensors_are_served_by_the_same_code(program):
    a, b, out = arguments(12, 6)
    code = program.compile()
    program(a[3:8], b[:, 3:8].contiguous(), out[3:8])
    torch.testing.assert_close(out[3:8], a[3:8] * 2 - b[:, 3:8].sum(0)[:, None])
    assert out[:3].isnan().all() and out[8:].isnan().all()
    assert program.compile() is code


def test_results_are_tensors_like_any_other(program):
    """Not made in inference mode: whoever calls may go on computing with them."""
    got, _ = program(*arguments(4, 2))
    got.add_(1)
    assert not got.is_inference()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b, out: (a.double(), b, out), "float64"),
        (lambda a, b, out: (a[:, :3].contiguous(), b, out), "size"),
        (lambda a, b, out: (a, b.T.contiguous().T, out), "stride"),
        (lambda a, b, out: (a, b[:, :4].contiguous(), out), "size"),
        (lambda a, b, out: (a, b, out[:4]), "size"),
    ],
    ids=["dtype", "fixed size", "stride", "same letter", "same letter, written"],
)
def test_what_it_was_not_compiled_for_is_refused(program, change, says):
    program(*arguments(5, 7))
    with pytest.raises(AssertionError, match=says):
        program(*change(*arguments(5, 7)))


def test_another_number_of_threads_has_code_of_its_own(program):
    before = torch.get_num_threads()
    first = program.compile()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        a, b, out = arguments(6, 3)
        got, total = program(a, b, out)
        assert torch.equal(got, a + 1)
        torch.testing.assert_close(total, b.sum(0))
        assert program.compile() is not first
    finally:
        torch.set_num_threads(before)
    assert program.compile() is first


def fill(x):
    x.fill_(2)


def test_one_tensor_and_none():
    options = {"compile_threads": 1}
    one = Program(lambda x: x * 3, "triple", [("N",)], options=options)
    assert torch.equal(one(torch.ones(5)), torch.full((5,), 3.0))
    nothing = Program(fill, "fill", [("N",)], options=options)
    x = torch.zeros(4)
    assert nothing(x) is None
    assert torch.equal(x, torch.full((4,), 2.0))


def test_more_sizes_than_it_can_tell_apart():
    with pytest.raises(AssertionError, match="at most 5 sizes"):
        Program(blend, "blend", [tuple("ABCDEF")], options={})
