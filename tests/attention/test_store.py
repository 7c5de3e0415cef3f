"""A store: what is written is what is answered from, and stores that share a sequence merge to one."""

import pytest
import torch

from infinillm.attention.partial import Partial, merge
from infinillm.attention.store import Store, build_table
from infinillm.core.types import AttentionShape
from infinillm.errors import BadRequest
from infinillm.kernels import reference
from infinillm.kernels.bodies import body

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 16, 8, "float32", 0.25, windows=(0, 6))


def store(blocks: int = 12, shape: AttentionShape = SHAPE) -> Store:
    return Store(shape, blocks, CPU, body(CPU))


def filled(tokens: int, held: list[int], blocks: list[int], seed: int) -> Store:
    """A store holding blocks `held` (in blocks) of a sequence of `tokens` random tokens, the same for one seed."""
    made = store()
    made.pool.fill_(float("nan"))
    for layer in range(SHAPE.layers):
        k, v = torch.randn(2, tokens, 2, 16, generator=torch.Generator().manual_seed(seed + layer))
        at = [p for p in range(tokens) if p // 8 in held]
        slots = torch.tensor([blocks[held.index(p // 8)] * 8 + p % 8 for p in at], dtype=torch.int64)
        made.write(layer, k[at], v[at], slots)
    return made


@pytest.mark.parametrize("layer", [0, 1])
def test_three_stores_answer_as_one(layer: int) -> None:
    q = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
    positions, split = [[27, 28, 29]], [[0, 3], [1], [2]]
    whole = filled(30, [0, 1, 2, 3], [5, 2, 7, 0], seed=2)
    expected = whole.attend(layer, q, build_table(positions, [([5, 2, 7, 0], [0, 8, 16, 24])], CPU))
    merged = Partial.empty(3, 4, 16, torch.float32, CPU)
    for held in split:
        blocks = list(range(len(held)))
        part = filled(30, held, blocks, seed=2)
        answer = part.attend(layer, q, build_table(positions, [(blocks, [8 * h for h in held])], CPU))
        merged = merge(merged, answer, part.body)
    assert torch.allclose(merged.o, expected.o, atol=1e-6)
    assert torch.allclose(merged.lse, expected.lse, atol=1e-6)


def test_each_layer_has_its_own_window() -> None:
    q = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(3))
    made = filled(30, [0, 1, 2, 3], [0, 1, 2, 3], seed=4)
    table = build_table([[29]], [([0, 1, 2, 3], [0, 8, 16, 24])], CPU)
    for layer, window in enumerate(SHAPE.windows):
        o, lse = reference.attend_blocks(q, *made.pool[layer], table, scale=0.25, window=window)
        answer = made.attend(layer, q, table)
        assert torch.allclose(answer.o, o, atol=1e-6)
        assert torch.allclose(answer.lse, lse, atol=1e-6)


def test_blocks_are_copied_with_all_their_layers() -> None:
    source, target = filled(30, [0, 1, 2, 3], [5, 2, 7, 0], seed=5), store()
    target.copy(source, [7, 5], [1, 3])
    assert torch.equal(target.pool[:, :, [1, 3]], source.pool[:, :, [7, 5]])
    assert not target.pool[:, :, 0].any()


def test_a_table_of_nothing() -> None:
    table = build_table([], [], CPU)
    assert [ids.tolist() for ids in table] == [[0], [], [0], [], []]
    answer = store().attend(0, torch.zeros(0, 4, 16), table)
    assert answer.o.shape == (0, 4, 16)


def test_a_table_is_as_it_was_asked() -> None:
    table = build_table([[4, 5], [], [9]], [([3], [0]), ([], []), ([1, 8], [0, 8])], CPU)
    assert [ids.tolist() for ids in table] == [[0, 2, 2, 3], [4, 5, 9], [0, 1, 1, 3], [3, 1, 8], [0, 0, 8]]
    assert {ids.dtype for ids in table} == {torch.int32}


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("blocks", lambda: store(-1)),
        ("dtype", lambda: store(shape=AttentionShape(4, 2, 16, 8, "int8", 0.25, (0,)))),
        ("holdings", lambda: build_table([[1]], [], CPU)),
        ("holdings", lambda: build_table([[1]], [([1, 2], [0])], CPU)),
        ("source", lambda: store().copy(store(shape=AttentionShape(4, 2, 16, 8, "float32", 0.25, (0,))), [0], [0])),
        ("target_blocks", lambda: store().copy(store(), [0, 1], [0])),
    ],
)
def test_bad_input_names_its_field(field: str, wrong) -> None:
    with pytest.raises(BadRequest) as refused:
        wrong()
    assert refused.value.field == field


def test_whole_blocks_are_the_memory_itself_and_mean_the_same_in_another_store() -> None:
    source, target = filled(30, [0, 1, 2, 3], [5, 2, 7, 0], seed=2), store()
    for layer in range(SHAPE.layers):
        for block, into in zip(source.whole(layer, [5, 7]), target.whole(layer, [3, 1]), strict=True):
            assert block.is_contiguous() and block.shape == (2, 2, 8, 16)
            into.copy_(block)
    assert torch.equal(target.pool[:, :, [3, 1]], source.pool[:, :, [5, 7]])
