"""The tables: 20 MVBench-like and 9 MLVU-like tasks, each with its files, its scenes and its question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mmllm.world import asks, families, long_asks, long_families
from mmllm.world.palette import Cast
from mmllm.world.question import Question
from mmllm.world.scene import Scene, Thing

Ask = Callable[[Scene, Thing], Question | None]
Sampler = Callable[[Random, Cast], Scene]


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    name: its name in the benchmark.
        name: its name in the benchmark.
        stem: the stem of its JSON file, and the prefix of its clips.
        folder: folder below ``video/``.
        options: number of options; 0 = answered in free text.
        sample: `(rng, cast) -> Scene`.
        ask: `(scene, thing) -> Question`, or `None` where it does not apply.
        bounded: whether items have ``start`` and ``end`` in seconds.
        reader: video (mp4) or frame (a folder of jpg files at 3 frames per second).
        share: how many times its scenes come in one round of training scenes; 1 for scenes whose question is also asked
            about many others.
    """

    name: str
    stem: str
    folder: str
    options: int
    sample: Sampler
    ask: Ask
    bounded: bool = False
    reader: str = "video"
    share: int = 2


_STAR, _CLEVRER, _PERCEPTION = "star/Charades_v1_480", "clevrer/video_validation", "perception/videos"
_F, _L, _Q, _R = families, long_families, asks, long_asks

MVBENCH: tuple[Task, ...] = (
    Task("Action Sequence", "action_sequence", _STAR, 4, _F.sequence, _Q.after, True),
    Task("Action Prediction", "action_prediction", _STAR, 4, _F.heading, _Q.wall, True, share=1),
    Task("Action Antonym", "action_antonym", "ssv2_video", 3, _F.sizing, _Q.size, share=1),
    Task("Fine-grained Action", "fine_grained_action", "Moments_in_Time_Raw/videos", 4, _F.doing, _Q.action, share=1),
    Task("Unexpected Action", "unexpected_action", "FunQA_test/test", 4, _F.unexpected, _Q.surprise, share=1),
    Task("Object Existence", "object_existence", _CLEVRER, 3, _F.existence, _Q.exists, share=1),
    Task("Object Interaction", "object_interaction", _STAR, 4, _F.interaction, _Q.touches, True),
    Task("Object Shuffle", "object_shuffle", _PERCEPTION, 3, _F.shuffle, _Q.final_place),
    Task("Moving Direction", "moving_direction", _CLEVRER, 4, _F.heading, _Q.direction, share=1),
    Task("Action Localization", "action_localization", "sta/sta_video", 4, _F.localized, _Q.localize, True),
    Task("Scene Transition", "scene_transition", "scene_qa/video", 4, _F.transition, _Q.change),
    Task("Action Count", "action_count", _PERCEPTION, 3, _F.counting, _Q.blink_count),
    Task("Moving Count", "moving_count", _CLEVRER, 4, _F.movers, _Q.moving_count, share=1),
    Task("Moving Attribute", "moving_attribute", _CLEVRER, 3, _F.mover, _Q.moving_color, share=1),
    Task("State Change", "state_change", _PERCEPTION, 3, _F.recolored, _Q.final_color, share=1),
    Task("Fine-grained Pose", "fine_grained_pose", "nturgbd", 4, _F.pose, _Q.pointing),
    Task("Character Order", "character_order", _PERCEPTION, 3, _F.appearing, _Q.appearance),
    Task("Egocentric Navigation", "egocentric_navigation", "vlnqa", 4, _F.navigation, _Q.camera),
    Task("Episodic Reasoning", "episodic_reasoning", "tvqa/frames_fps3_hq", 5, _F.episode, _Q.while_on, True, "frame"),
    Task("Counterfactual Inference", "counterfactual_inference", _CLEVRER, 4, _F.counterfactual, _Q.without, share=1),
)

MLVU: tuple[Task, ...] = (
    Task("plotQA", "1_plotQA", "plotQA", 4, _L.plot, _R.part_color),
    Task("needle", "2_needle", "needle", 4, _L.needle, _R.flash_color),
    Task("ego", "3_ego", "ego", 4, _L.passing, _R.passed_color),
    Task("count", "4_count", "count", 4, _L.blinks, _R.long_count),
    Task("order", "5_order", "order", 4, _L.events, _R.event_order),
    Task("anomaly_reco", "6_anomaly_reco", "anomaly_reco", 4, _L.anomaly, _R.odd, share=1),
    Task("topic_reasoning", "7_topic_reasoning", "topic_reasoning", 4, _L.topic, _R.mostly),
    Task("sub_scene", "8_sub_scene", "subPlot", 0, _L.subplot, _R.part_story, share=1),
    Task("summary", "9_summary", "summary", 0, _L.story, _R.whole_story, share=1),
)

EXTRAS: tuple[tuple[Ask, int], ...] = (
    (_Q.before, 4),
    (_R.background, 4),
    (_R.object_count, 4),
    (_R.shape, 4),
)
"""Questions that only training asks, with their numbers of options."""
