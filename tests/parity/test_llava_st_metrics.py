"""LLaVA-ST's metrics, answers and records against the authors' code."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from mmllm.contract.grounding import Box, Coordinates, TimeSpan
from mmllm.data.media.sampling import SAMPLERS
from mmllm.data.records.formats.variables import LISTS, with_places
from mmllm.eval.grounding_scores import recalls, span_iou, tube_iou
from mmllm.processing.grounding import read

LAYOUT = Coordinates(first=0)
NUMBER = re.compile(r"\d+\.\d+")
NOTHING = TimeSpan(0.0, 0.0)


def text(golden, name: str) -> list[str]:
    """An array of texts, or a single one."""
    golden.unread.discard(name)
    return golden.arrays[name].reshape(-1).tolist()


def records(golden, name: str) -> list[dict]:
    """A list kept as JSON."""
    return json.loads(text(golden, name)[0])


@pytest.mark.golden("llava_st_metrics")
def test_spans(golden):
    spans = zip(golden["tiou_a"].tolist(), golden["tiou_b"].tolist(), strict=True)
    raises, expected = golden["tiou_raises_zero_division"].tolist(), golden["tiou_out"].tolist()
    for (one, other), fails, value in zip(spans, raises, expected, strict=True):
        first, second = TimeSpan(*one), TimeSpan(*other)
        if fails:
            with pytest.raises(ZeroDivisionError):
                span_iou(first, second, reference=True)
            assert span_iou(first, second) == 1.0  # the same instant
            continue
        assert span_iou(first, second, reference=True) == pytest.approx(value, abs=1e-6)
        ordered = one[0] <= one[1] and other[0] <= other[1]
        if ordered and value:  # where they meet, union and hull are the same
            assert span_iou(first, second) == pytest.approx(value, abs=1e-6)


@pytest.mark.golden("llava_st_metrics")
def test_boxes(golden):
    pairs = zip(golden["box_a"].tolist(), golden["box_b"].tolist(), golden["box_iou_out"].tolist(), strict=True)
    for one, other, expected in pairs:
        assert Box(*one).iou(Box(*other)) == pytest.approx(expected, abs=1e-6)


def frame_of(moment: float, split: list[int]) -> int:
    """The frame that a moment is nearest to."""
    return split[0] + round(moment * (split[1] - split[0]))


def scores_of(sample: dict) -> tuple[float, float, float]:
    """(tIoU, sIoU, vIoU) of a sample, by our reading of its answer."""
    found, split, truth = read(sample["outputs"], LAYOUT), sample["split"], sample["gt"]
    sizes = (sample["width"], sample["height"]) * 2

    def pixels(box: Box) -> Box:
        return Box(*(round(share * size) for share, size in zip((box.x0, box.y0, box.x1, box.y1), sizes, strict=True)))

    own = {frame_of(moment, split): pixels(box) for moment, box in found.tube.boxes}
    boxes = {int(frame): Box(*sides) for frame, sides in truth["svg"].items()}
    length = split[1] - split[0]
    if "tvg" not in truth:
        return (float("nan"), *tube_iou(own, boxes))
    gold = TimeSpan(*(round((frame - split[0]) / length, 3) for frame in truth["tvg"]))
    span = (
        TimeSpan(*(round(side, 5) for side in (found.spans[0].start, found.spans[0].end))) if found.spans else NOTHING
    )
    return (span_iou(span, gold, reference=True), *tube_iou(own, boxes))


@pytest.mark.golden("llava_st_metrics", cases=r"(stvg|svg|elc)_samples_json")
def test_samples(golden, case):
    names, raised = text(golden, f"{case}_aggregate_names"), text(golden, f"{case}_per_sample_exception")
    expected, rows = golden[f"{case}_per_sample_tiou_siou_viou"].tolist(), []
    for sample, error, row in zip(records(golden, f"{case}_samples_json"), raised, expected, strict=True):
        if error == "ZeroDivisionError":
            with pytest.raises(ZeroDivisionError):
                scores_of(sample)
            continue
        if error:  # a frame of the truth that is not among the hundred: their assertion, which we do not have
            scores_of(sample)
            continue
        found = scores_of(sample)
        for mine, theirs in zip(found, row, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5) or (np.isnan(mine) and theirs in (0, 1)) or np.isnan(theirs)
        rows.append([theirs if np.isnan(mine) else mine for mine, theirs in zip(found, row, strict=True)])
    aggregate = dict(zip(names, golden[f"{case}_aggregate_over_non_raising"].tolist(), strict=True))
    for index, (mean, short) in enumerate((("mtiou", "tiou"), ("msiou", "siou"), ("mstiou", "viou"))):
        values = [row[index] for row in rows]
        assert np.mean(values) == pytest.approx(aggregate[mean], abs=1e-5)
        for name, share in recalls(values).items():
            assert share == pytest.approx(aggregate[name.replace("recall", short)], abs=1e-4)


@pytest.mark.golden("llava_st_metrics")
def test_answers_read_as_numbers(golden):
    for written, numbers in zip(text(golden, "text_in"), text(golden, "text_normalized"), strict=True):
        found = read(written, LAYOUT)
        mine = [side for span in found.spans for side in (span.start, span.end)]
        for moment, box in found.tube.boxes:
            mine += [moment, box.x0, box.y0, box.x1, box.y1]
        theirs = [float(number) for number in NUMBER.findall(numbers)]
        assert len(theirs) == len(mine) + found.broken  # a lone moment is no span
        assert mine == pytest.approx(theirs[: len(mine)], abs=1e-5)


@pytest.mark.golden("llava_st_metrics")
def test_records_with_values_beside_them(golden):
    for raw in text(golden, "prompt_out_json_text_and_variables"):
        prompt, variables = json.loads(raw)
        (message,) = with_places([{"role": "user", "content": prompt}], variables, "line 1")
        found: dict[str, list[float]] = {name: [] for name in LISTS.values()}
        for entry in message["content"]:
            if entry["type"] == "location":
                found[LISTS[entry["axis"]]].append(entry["at"])
        assert all(values == variables[f"{name}_input_locations"] for name, values in found.items())
        texts = "".join(entry["text"] for entry in message["content"] if entry["type"] == "text")
        assert texts == re.sub(r"<(TEMP|WIDTH|HEIGHT)-INPUT>", "", prompt)
    assert len(text(golden, "prompt_in")) == len(text(golden, "prompt_out_json_text_and_variables"))


@pytest.mark.golden("llava_st_metrics")
def test_single_spans_and_boxes(golden):
    spans = [(numbers_of(row["converted_outputs"], 2), row["gt"]) for row in records(golden, "tvg_samples_json")]
    values = [span_iou(TimeSpan(*own), TimeSpan(*gold), reference=True) if own else 0.0 for own, gold in spans]
    mean, *shares = golden["tvg_out_miou_r03_r05_r07"].tolist()
    assert np.mean(values) == pytest.approx(mean, abs=1e-6)
    strict = [100 * sum(value > least for value in values) / len(values) for least in (0.3, 0.5, 0.7)]
    assert strict == pytest.approx(shares, abs=1e-4)  # the authors demand more than the threshold here
    boxes = [(numbers_of(row["converted_outputs"], 4), row["gt_bbox"]) for row in records(golden, "rec_samples_json")]
    overlaps = [Box(*own).iou(Box(*gold)) if own else None for own, gold in boxes]
    mean, share = golden["rec_out_miou_r05_percent"].tolist()
    kept = [value for value in overlaps if value is not None]  # theirs; for us an answer without a box is worth 0
    assert np.mean(kept) == pytest.approx(mean, abs=1e-6)
    assert 100 * sum(value >= 0.5 for value in kept) / len(kept) == pytest.approx(share, abs=1e-4)


def numbers_of(answer: str, count: int) -> list[float] | None:
    """The numbers of an answer that the authors have made of tokens."""
    found = [float(number) for number in NUMBER.findall(answer)]
    return found if len(found) == count else None


@pytest.mark.golden("llava_st_metrics")
def test_frames(golden):
    for (first, last), frames in zip(
        golden["frame_index_split"].tolist(), golden["frame_index_100"].tolist(), strict=True
    ):
        assert SAMPLERS["ends"](first, last, len(frames)) == frames


@pytest.mark.golden("llava_st_metrics", cases=r"(stvg|svg|elc)_pred_caption")
def test_where_the_authors_take_a_caption_from(golden, case):
    """We score no captions; this only holds what a later scorer would have to do."""
    for sample, caption in zip(
        records(golden, f"{case}_samples_json"), text(golden, case + "_pred_caption"), strict=True
    ):
        assert sample["outputs"].split(".")[0].rpartition(",")[2] == caption
