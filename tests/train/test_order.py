"""The order of samples: whole batches, every sample trains in the end, nothing depends on how a batch is cut."""

from __future__ import annotations

import pytest

from mmllm.train.order import EpochOrder, Turns, draw_key


def epochs(samples: int, batch: int, count: int, seed: int = 0) -> list[list[int]]:
    order = EpochOrder(samples, batch, seed)
    found = []
    for epoch in range(count):
        order.set_epoch(epoch)
        turns = [Turns(range(samples))[index] for index in order]
        assert {of for _, of in turns} == {epoch}
        found.append([number for number, _ in turns])
    return found


@pytest.mark.parametrize(("samples", "batch"), [(12, 4), (13, 4), (15, 4), (3, 4), (7, 7)])
def test_an_epoch_is_whole_batches_without_a_sample_twice(samples, batch):
    order = EpochOrder(samples, batch, seed=3)
    numbers = list(order)
    assert len(numbers) == len(order) == (samples // batch * batch or samples)
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= set(range(samples))


def test_every_sample_trains_though_each_epoch_leaves_some_out():
    seen = epochs(samples=15, batch=4, count=20)
    assert set().union(*seen) == set(range(15))
    left_out = [set(range(15)) - set(epoch) for epoch in seen]
    assert len({frozenset(rest) for rest in left_out}) > 10


def test_processes_that_continue_an_epoch_share_its_order():
    from accelerate.data_loader import prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader

    whole, seen = epochs(12, 4, 2)[1], []
    for process in range(2):
        order = EpochOrder(12, 4, seed=0)
        loader = DataLoader(Turns(range(12)), batch_size=2, sampler=order, collate_fn=list)
        options = {"num_processes": 2, "process_index": process, "put_on_device": False}
        loader = skip_first_batches(prepare_data_loader(loader, **options), 1)
        order.set_epoch(1)  # as the trainer says it, whatever stands between the loader and its order
        seen.append(list(loader))
    seen = [[[number for number, _ in batch] for batch in process] for process in seen]
    batches = [sorted(one + other) for one, other in zip(*seen, strict=True)]
    assert batches == [sorted(whole[4:8]), sorted(whole[8:])]


def test_epochs_differ_and_repeat_with_the_seed():
    one, again, other = epochs(15, 4, 3), epochs(15, 4, 3), epochs(15, 4, 3, seed=1)
    assert one == again
    assert one[0] != one[1] != one[2]
    assert one[0] != other[0]


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone():
    keys = {draw_key(seed, epoch, number) for seed in range(3) for epoch in range(3) for number in range(50)}
    assert len(keys) == 450
    assert draw_key(0, 1, 2) == 67993824929395517
