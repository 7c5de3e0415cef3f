"""What the seam refuses, and that it names the tensor."""

from collections.abc import Callable

import pytest
import torch

from infinillm.kernels import native, torch_body
from infinillm.kernels.bodies import Body
from tests.kernels.questions import SEQUENCES, Question, Shape, ask

QUESTION = ask(Shape(4, 2, 16, 8), SEQUENCES[:2], torch.float32, seed=1)


@pytest.fixture(scope="module", params=["torch", "native"])
def body(request: pytest.FixtureRequest) -> Body:
    found = torch_body if request.param == "torch" else native.load(None)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def table(**changes: torch.Tensor) -> Callable[[Question], Question]:
    return lambda question: question._replace(table=question.table._replace(**changes))


WRONG_QUESTIONS = {
    "q": [
        lambda x: x._replace(q=x.q.double()),
        lambda x: x._replace(q=x.q.half()),
        lambda x: x._replace(q=x.q[:, :3]),
        lambda x: x._replace(q=x.q[..., :8]),
        lambda x: x._replace(q=x.q.transpose(0, 1).contiguous().transpose(0, 1)),
        lambda x: x._replace(q=x.q.to("meta")),
    ],
    "k_blocks": [lambda x: x._replace(k_blocks=x.k_blocks[0])],
    "v_blocks": [
        lambda x: x._replace(v_blocks=x.v_blocks[1:]),
        lambda x: x._replace(v_blocks=x.v_blocks.bfloat16()),
        lambda x: x._replace(v_blocks=x.v_blocks.transpose(1, 2).contiguous().transpose(1, 2)),
        lambda x: x._replace(v_blocks=torch.stack([x.v_blocks, x.v_blocks], 2)[:, :, 0]),
    ],
    "table.rows": [table(rows=QUESTION.table.rows.long())],
    "table.positions": [table(positions=QUESTION.table.positions[1:])],
    "table.spans": [table(spans=QUESTION.table.spans[1:])],
    "table.firsts": [table(firsts=QUESTION.table.firsts[1:])],
    "table.blocks": [table(blocks=QUESTION.table.blocks.to("meta"))],
}


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, changes in WRONG_QUESTIONS.items() for c in changes])
def test_a_wrong_question_is_refused_by_name(body: Body, name: str, change: Callable[[Question], Question]) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{name} "):
        body.attend_blocks(*change(QUESTION), scale=0.2)


def test_a_block_outside_the_pool_is_refused() -> None:
    body = native.load(None)
    if body is None:
        pytest.skip("no C++ compiler")
    for block in (-1, 10**6):
        wrong = table(blocks=torch.full_like(QUESTION.table.blocks, block))(QUESTION)
        with pytest.raises(ValueError, match=r"table\.blocks"):
            body.attend_blocks(*wrong, scale=0.2)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", {"k": torch.zeros(2, 2, 8)}),
        ("k", {"k": torch.zeros(2, 2, 16, dtype=torch.float16)}),
        ("v", {"v": torch.zeros(3, 2, 16)}),
        ("v", {"v": torch.zeros(16, 2, 2).permute(2, 1, 0)}),
        ("slots", {"slots": torch.zeros(2, dtype=torch.int32)}),
        ("slots", {"slots": torch.zeros(4, dtype=torch.int64)[::2]}),
    ],
)
def test_a_wrong_write_is_refused_by_name(body: Body, name: str, change: dict[str, torch.Tensor]) -> None:
    right = {"k": torch.zeros(2, 2, 16), "v": torch.zeros(2, 2, 16), "slots": torch.zeros(2, dtype=torch.int64)}
    x = {**right, **change}
    with pytest.raises((ValueError, TypeError), match=rf"^{name} "):
        body.write_blocks(x["k"], x["v"], QUESTION.k_blocks, QUESTION.v_blocks, x["slots"])


def test_a_slot_outside_the_pool_is_refused() -> None:
    body = native.load(None)
    if body is None:
        pytest.skip("no C++ compiler")
    pool = torch.zeros(2, 3, 2, 8, 16)
    for slot in (-1, 24):
        with pytest.raises(ValueError, match="slots"):
            body.write_blocks(torch.ones(1, 2, 16), torch.ones(1, 2, 16), *pool, torch.tensor([slot]))
    assert not pool.any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("o_b", {"o_b": torch.zeros(3, 2, 8)}),
        ("o_b", {"o_b": torch.zeros(3, 2, 16, dtype=torch.float16)}),
        ("lse_a", {"lse_a": torch.zeros(3, 2, dtype=torch.float64)}),
        ("lse_b", {"lse_b": torch.zeros(3, 1)}),
        ("o_a", {"o_a": torch.zeros(3, 16)}),
    ],
)
def test_a_wrong_merge_is_refused_by_name(body: Body, name: str, change: dict[str, torch.Tensor]) -> None:
    right = {"o_a": torch.zeros(3, 2, 16), "lse_a": torch.zeros(3, 2)}
    right |= {"o_b": torch.zeros(3, 2, 16), "lse_b": torch.zeros(3, 2)}
    x = {**right, **change}
    with pytest.raises((ValueError, TypeError), match=rf"^{name} "):
        body.merge(x["o_a"], x["lse_a"], x["o_b"], x["lse_b"])
