"""The instrument: its arithmetic, what it says of missing peers, and that every sub-command prints its table.

No time is asserted anywhere.
"""

import dataclasses
import json
import sys
import threading

import av
import benchmark
import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import checkpoints, decode, load, measuring, model, peers, preprocess, report, sdpa, serve
from benchmarks.clips import ClipSpec, draw_clip, make_clip
from benchmarks.measuring import Contestant, Spread
from handler.kernels import onednn as onednn_kernels
from handler.threads import available_cores
from handler.video import decode_frames, open_video
from tests.support.clips import write_clip

PEERS = ("torchcodec.decoders", "decord", "cv2")


def new_report(**settings):
    return report.Report("test", settings=settings)


def quick(command, *arguments):
    """Runs a sub-command on its tiny settings, in this process."""
    return benchmark.run(benchmark.parse_arguments([command, "--quick", *arguments]))


# Arithmetic


def test_a_spread_is_the_median_between_the_extremes():
    assert Spread.of([5, 1, 3]) == Spread(3, 1, 5)
    assert Spread.of([4, 1]) == Spread(2.5, 1, 4)
    assert Spread(3, 1, 5).times(2) == Spread(6, 2, 10)


def test_ratios_say_how_many_times_as_long_as_ours():
    assert measuring.ratio_to_ours(30.0, 10.0) == 3
    assert measuring.ratio_to_ours(30.0, None) is None


@pytest.mark.parametrize("percent, expected", [(50, 50), (95, 95), (99, 99), (100, 100), (1, 1)])
def test_percentiles_of_a_hundred_values_are_the_values(percent, expected):
    assert measuring.percentile(range(100, 0, -1), percent) == expected


def test_a_percentile_of_few_values_is_one_of_them():
    assert [measuring.percentile([7, 3], percent) for percent in (1, 50, 51, 99)] == [3, 3, 7, 7]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 3},
        {"num_labels": 5},
        {"tubelet_size": (4, 16, 8)},
        {"intermediate_size": 40},
    ],
)
def test_the_operations_of_a_clip_are_those_that_torch_counts(changes):
    unnamed = {"id2label": None, "label2id": None}
    config = dataclasses.replace(checkpoints.CONFIGS["tiny"], **{**unnamed, **changes})
    theirs = transformers.VivitForVideoClassification(
        transformers.VivitConfig(**config.to_dict(), attn_implementation="eager")
    )
    clip = torch.zeros(1, config.num_frames, config.num_channels, config.image_height, config.image_width)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        theirs(clip)
    assert checkpoints.clip_flops(config) == counted.get_total_flops()


def test_a_clip_of_the_published_model_is_nine_tenths_of_a_teraflop():
    assert round(checkpoints.clip_flops(checkpoints.CONFIGS["base"]) / 1e12, 1) == 0.9


def test_savings_are_counted_as_the_documentation_does():
    # The memory of its first row: 715.807 MB with eager, 317.079 MB with SDPA, 125.75 % saved.
    assert round(sdpa.saving_percent(715.807, 317.079), 2) == sdpa.PUBLISHED["inference", 1][1]


def test_cores_that_do_two_things_do_each_half_as_often():
    assert serve.shared_limit(10, 10) == 5
    assert serve.shared_limit(2, 1e9) == pytest.approx(2)


# Taking turns


def test_contestants_take_turns_after_one_untimed_call_each():
    calls = []
    contestants = [Contestant(name, lambda name=name: calls.append(name)) for name in "abc"]
    timings, failures = measuring.take_turns(contestants, repetitions=2)
    assert "".join(calls) == "abcabcabc"
    assert not failures
    assert [len(timing.wall_ms) for timing in timings.values()] == [2, 2, 2]


def test_preparing_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def take(seconds):
        clock[0] += seconds

    contestant = Contestant("a", lambda prepared: take(1), prepare=lambda: take(100))
    timings, _ = measuring.take_turns([contestant], repetitions=3)
    assert timings["a"].wall_ms == [1000, 1000, 1000]


def test_one_that_fails_is_out_and_the_others_go_on():
    def fail():
        raise OSError("no such codec\nand a long story")

    contestants = [Contestant("bad", fail), Contestant("good", int)]
    timings, failures = measuring.take_turns(contestants, repetitions=1)
    assert list(timings) == ["good"]
    assert failures == {"bad": "OSError: no such codec"}


def test_results_can_be_compared():
    seen = {}
    measuring.take_turns([Contestant("a", lambda: 7)], repetitions=1, inspect=seen.__setitem__)
    assert seen == {"a": 7}


def test_a_contestant_is_kept_on_its_cores():
    before, threads = available_cores(), torch.get_num_threads()
    with measuring.on_cores(1):
        assert available_cores() == torch.get_num_threads() == 1
    assert (available_cores(), torch.get_num_threads()) == (before, threads)


# The report


def test_a_table_has_a_line_a_row_and_a_dash_for_what_is_missing(capsys):
    rows = [{"name": "a", "ms": 12.34}, {"name": "b", "ms": None}, {"name": "c"}]
    new_report().table("t", (("who", "{name}"), ("ms", "{ms:.1f}")), rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert lines == [["who", "ms"], ["---", "----"], ["a", "12.3"], ["b", "-"], ["c", "-"]]


def test_everything_measured_is_in_the_json(tmp_path):
    found = new_report(threads=[1, 3])
    found.table("t", (("ms", "{ms:.0f}"),), [{"ms": 12.34, "not shown": 5}])
    found.note("mind the gap")
    found.write_json(tmp_path / "r.json")
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["tables"] == {"t": [{"ms": 12.34, "not shown": 5}]}
    assert read["settings"] == {"threads": [1, 3]}
    assert "mind the gap" in read["notes"]
    assert {"cpu", "cores_available", "gpus"} <= set(read["machine"])
    assert read["versions"]["av"] == av.__version__


def test_a_busy_machine_is_said(monkeypatch, capsys):
    monkeypatch.setattr(report.os, "getloadavg", lambda: (1000.0, 0, 0))
    new_report().finish()
    assert "the machine was busy" in capsys.readouterr().out


@pytest.mark.parametrize("module", PEERS)
def test_a_missing_peer_is_said_once(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    found = new_report()
    assert peers.load(module, found) is None and peers.load(module, found) is None
    found.finish()
    name = {"torchcodec.decoders": "torchcodec", "cv2": "opencv-python-headless"}.get(module, module)
    assert capsys.readouterr().out.count(f"not measured: {name}") == 1


def test_a_missing_matplotlib_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        quick("preprocess", "--plot", "p.png")


# Arguments


@pytest.mark.parametrize("command", benchmark.COMMANDS)
def test_quick_sets_only_what_there_is_and_what_is_asked_for_wins(command):
    ordinary = vars(benchmark.parse_arguments([command]))
    tiny = vars(benchmark.parse_arguments([command, "--quick"]))
    assert set(benchmark.COMMANDS[command].QUICK) <= set(ordinary) == set(tiny)
    asked = benchmark.parse_arguments([command, "--quick", "--repetitions", "9"])
    assert asked.repetitions == 9 != tiny["repetitions"]


@pytest.mark.parametrize("text", ["1280", "1280x", "x720", "axb"])
def test_a_frame_size_is_width_times_height(text):
    assert preprocess.parse_size("1280x720") == (1280, 720)
    with pytest.raises(preprocess.argparse.ArgumentTypeError, match="WIDTHxHEIGHT"):
        preprocess.parse_size(text)


def test_the_server_is_measured_as_it_is_configured():
    arguments = benchmark.parse_arguments(["serve"])
    models = json.loads(serve.read_properties(serve.SERVER_CONFIG)["models"])["vivit"]["1.0"]
    assert (arguments.workers, arguments.batch_size, arguments.max_batch_delay_ms) == (
        models["minWorkers"],
        models["batchSize"],
        models["maxBatchDelay"],
    )


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold video files"):
        quick("decode", "--videos", str(tmp_path))


# Clips


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_a_made_clip_is_what_its_name_says(codec, tmp_path):
    path = make_clip(tmp_path, ClipSpec(96, 1, codec, gop_frames=10), new_report())
    with open_video(path) as video:
        info = video.info
    assert (info.codec, info.height, info.frame_count, round(info.fps)) == (codec, 96, 30, 30)
    with av.open(str(path)) as container:
        keyframes = sum(bool(packet.size and packet.is_keyframe) for packet in container.demux(video=0))
    assert keyframes == 3


def test_a_made_clip_is_kept(tmp_path):
    spec = ClipSpec(48, 0.2)
    path = make_clip(tmp_path, spec, new_report())
    path.write_bytes(b"kept")
    assert make_clip(tmp_path, spec, new_report()).read_bytes() == b"kept"


def test_scenes_move_have_grain_and_differ_by_seed():
    frames = draw_clip(3, height=96, width=160).astype(int)
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 1).all()
    assert frames.std() > 20
    assert np.abs(frames[0] - draw_clip(1, height=96, width=160, seed=1)[0].astype(int)).mean() > 5


# Decoding: what is right and what is wrong


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"), ClipSpec(96, 3, gop_frames=20), new_report())


INDICES = np.array([3, 17, 40, 41, 88])


def test_frames_of_sequential_decoding_are_right(clip):
    truth = decode.Truth.of(clip, INDICES)
    assert truth.judge(decode_frames(clip, INDICES), INDICES) == {"wrong_frames": 0, "differing_frames": 0}


def test_another_moment_is_wrong_and_another_colour_is_not(clip):
    truth = decode.Truth.of(clip, INDICES)
    frames = decode_frames(clip, INDICES)
    frames[1] = decode_frames(clip, [18])[0]
    frames[4] = np.clip(frames[4].astype(int) + [6, -4, 9], 0, 255)
    assert truth.judge(frames, INDICES) == {"wrong_frames": 1, "differing_frames": 2}


def test_missing_frames_and_frames_of_another_size_are_wrong(clip):
    truth = decode.Truth.of(clip, INDICES)
    frames = decode_frames(clip, INDICES)
    assert truth.judge(frames[:3], INDICES) == {"wrong_frames": 2, "differing_frames": 2}
    assert truth.judge(frames[:, ::2], INDICES) == {"wrong_frames": 5, "differing_frames": 5}


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_the_truth_stands_upright(rotation, tmp_path):
    frames = draw_clip(6, height=48, width=64)
    path = write_clip(tmp_path / "turned.mp4", frames, rotation=rotation)
    indices = np.arange(6)
    truth = decode.Truth.of(path, indices)
    assert truth.judge(decode_frames(path, indices), indices)["differing_frames"] == 0


def test_the_floor_decodes_all_that_is_wanted_and_no_more_than_that_takes(clip):
    decoder, stretches, wanted_pts = prepared = decode.prepare_packets(clip, INDICES, 1)
    with av.open(str(clip)) as container:
        everything = sum(1 for packet in container.demux(video=0) if packet.size)
    assert len(wanted_pts) == len(INDICES)
    assert sum(map(len, stretches)) < everything
    assert all(stretch[0].is_keyframe for stretch in stretches)
    assert decode.decode_packets(prepared) == len(INDICES)


def test_every_decoder_that_is_there_gives_the_frames(clip):
    found = new_report()
    decoders = decode.load_decoders(found)
    truth = decode.Truth.of(clip, INDICES)
    for function in decoders.values():
        assert truth.judge(function(clip, INDICES, 1), INDICES)["wrong_frames"] == 0
    missing = [note for note in found.notes if note.startswith("not measured")]
    assert len(decoders) + len(missing) == 2 + len(PEERS)


# Load


def test_a_window_counts_whole_batches():
    # Batches of 4 answers every 10 s; the window goes from the first answer of one to the first of another.
    answers = [load.Answer(10 * batch + 0.1 * number, 5.0, None) for batch in range(6) for number in range(4)]
    found = load.summarize(answers, begin_s=10, end_s=40)
    assert found.clips_per_s == pytest.approx(0.4)
    assert len(found.latencies_ms) == 12


def test_errors_are_counted_apart():
    answers = [load.Answer(1, 9.0, None), load.Answer(2, 1.0, "HTTP 503"), load.Answer(3, 1.0, "HTTP 503")]
    found = load.summarize(answers, begin_s=0, end_s=4)
    assert (found.clips_per_s, found.latencies_ms, found.errors) == (0.25, [9.0], {"HTTP 503": 2})
    assert found.percentiles_ms() == {"p50_ms": 9.0, "p95_ms": 9.0, "p99_ms": 9.0}
    assert load.summarize([], begin_s=0, end_s=1).percentiles_ms() == {}


def test_clients_ask_side_by_side_and_every_video_as_often_as_the_others():
    lock, asking, most, numbers = threading.Lock(), [0], [0], []

    def send(number):
        with lock:
            asking[0] += 1
            most[0] = max(most[0], asking[0])
            numbers.append(number)
        threading.Event().wait(0.01)
        with lock:
            asking[0] -= 1

    found = load.drive(send, clients=3, seconds=0.2, warm_up_s=0.05)
    assert most[0] == 3
    assert asking[0] == 0, "drive must return with no request under way"
    assert sorted(numbers) == list(range(len(numbers)))
    assert found.clips_per_s > 0 and not found.errors


# Pictures


@pytest.mark.parametrize(
    "command, row, expected",
    [
        (
            decode,
            {
                "file": "a.mp4",
                "sampling": "evenly",
                "threads": 3,
                "decoder": "decord",
                "wall_ms": 30.0,
                "wall_low_ms": 20.0,
                "wall_high_ms": 40.0,
                "wall_ratio": 3.0,
            },
            {"a.mp4\nevenly, on 3": {"decord": Spread(3, 2, 4)}},
        ),
        (
            preprocess,
            {
                "size": "8x6",
                "to": "bytes",
                "clips": 1,
                "cores": 2,
                "processor": "torch",
                "wall_ms": 4.0,
                "wall_low_ms": 2.0,
                "wall_high_ms": 8.0,
                "wall_ratio": 0.5,
            },
            {"8x6 to bytes\n1 at once on 2 cores": {"torch": Spread(0.5, 0.25, 1)}},
        ),
        (
            model,
            {
                "dtype": "float16",
                "batch": 4,
                "model": "ours",
                "wall_ms": 500.0,
                "wall_low_ms": 400.0,
                "wall_high_ms": 800.0,
            },
            {"float16, batch 4": {"ours": Spread(8, 5, 10)}},
        ),
        (
            sdpa,
            {
                "mode": "inference",
                "dtype": "float32",
                "batch": 2,
                "eager_ms": 4.0,
                "eager_low_ms": 2.0,
                "eager_high_ms": 6.0,
            },
            {"inference, float32, batch 2": {"eager": Spread(2, 1, 3)}},
        ),
    ],
)
def test_a_picture_shows_what_the_table_says(command, row, expected, monkeypatch):
    found = new_report()
    found.tables[command.TABLE] = [row]
    monkeypatch.setattr(command, "bars", lambda groups, **labels: groups)
    assert command.plot(found) == expected


# Every sub-command, on tiny settings


def test_decode_prints_a_table_a_file(capsys):
    found = quick("decode")
    rows = found.tables[decode.TABLE]
    assert {row["sampling"] for row in rows} == {"evenly", "inside"}
    assert {"ours", "ours, open", "floor", "recipe"} <= {row["decoder"] for row in rows}
    assert not [row for row in rows if row["decoder"] in ("ours", "recipe") and row["differing_frames"]]
    printed = capsys.readouterr().out
    assert "96p-1.5s-h264-gop12.mp4" in printed and "CPU ms" in printed


def test_decode_goes_on_after_a_file_that_cannot_be_used(tmp_path, clip, capsys):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "b.mp4").write_bytes(clip.read_bytes())
    found = quick("decode", "--videos", str(tmp_path))
    assert {row["file"] for row in found.tables[decode.TABLE]} == {"b.mp4"}
    assert "a.mp4 left out: NotAVideoError" in capsys.readouterr().out


def test_preprocess_says_how_far_from_transformers(capsys):
    tables = quick("preprocess").tables
    rows = tables[preprocess.TABLE]
    ours = [row for row in rows if row["processor"] == "ours"]
    assert {(row["to"], row["clips"], row["cores"]) for row in ours} == {
        (to, clips, cores) for to in ("bytes", "floats") for clips, cores in ((1, 1), (1, 2), (2, 2))
    }
    assert not [row for row in ours if row["differing_share"]]
    assert {row["processor"] for row in rows} == {"ours", "ours, fast", "ours, call", "transformers"}
    answers = {row["model"]: row for row in tables[preprocess.ANSWERS_TABLE]}
    assert answers["demo"]["clips"] == 9 and answers["tiny"]["clips"] == 2
    assert all(0 <= row["same_top_1"] <= 1 and row["largest_difference"] < row["spread"] for row in answers.values())
    assert "share that differs" in capsys.readouterr().out


def test_preprocess_works_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = quick("preprocess", "--answers").tables[preprocess.TABLE]
    assert {row["processor"] for row in rows} == {"ours", "ours, fast", "ours, call"}
    assert "not measured: transformers" in capsys.readouterr().out


@pytest.mark.parametrize("onednn, products", [(False, ["matmul"]), (True, ["matmul", "matmul, oneDNN"])])
def test_model_shows_ours_and_theirs_beside_the_matrix_product(onednn, products, capsys, monkeypatch):
    monkeypatch.setattr(onednn_kernels, "IS_FASTER", onednn)
    rows = quick("model").tables[model.TABLE]
    assert [row["model"] for row in rows if row["batch"] == 2] == [
        "ours",
        "ours, served",
        "ours, int8",
        "transformers sdpa",
        "transformers eager",
        *products,
    ]
    differences = {row["model"]: row["logit_difference"] for row in rows if row["model"] not in products}
    assert 1e-4 < differences.pop("ours, int8") < 0.1
    assert max(differences.values()) < 1e-4
    assert "of matmul" in capsys.readouterr().out


def test_model_tells_how_many_answers_a_dtype_changes_on_the_demo():
    rows = quick("model", "--size", "demo", "--batches", "1", "--agreement-clips", "9").tables[model.AGREEMENT]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16", "int8"]
    assert rows[0]["agreeing_share"] == 1 and rows[0]["logit_difference"] == 0
    assert all(0 <= row["agreeing_share"] <= 1 and 0 <= row["right_share"] <= 1 for row in rows)


def test_sdpa_fills_its_table(capsys):
    rows = quick("sdpa", "--training-steps", "0").tables[sdpa.TABLE]
    assert [row["mode"] for row in rows] == ["inference"]
    assert {"eager_ms", "sdpa_ms", "speedup_percent", "eager_peak_mb", "saved_percent"} <= set(rows[0])
    assert "speed-up %" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_published_figures_stand_beside_ours(mode):
    task = {
        "config": checkpoints.CONFIGS["tiny"],
        "mode": mode,
        "batch": 1,
        "dtype": "float32",
        "steps": 2,
        "device": "cpu",
        "threads": 1,
    }
    row = sdpa.compare(task, sdpa.measure_task, 2, new_report())
    assert row["speedup_percent"] == sdpa.saving_percent(row["eager_ms"], row["sdpa_ms"])
    assert (row["published_speedup_percent"], row["published_saved_percent"]) == sdpa.PUBLISHED[mode, 1]


def test_a_measurement_that_dies_is_said_and_leaves_a_gap(capsys):
    def measure(task):
        if task.attention == "eager":
            raise RuntimeError("CUDA out of memory")
        return sdpa.Outcome([1.0], 10, 20)

    found = new_report()
    task = {
        "config": None,
        "mode": "training",
        "batch": 1,
        "dtype": "float32",
        "steps": 1,
        "device": "cpu",
        "threads": 1,
    }
    row = sdpa.compare(task, measure, 1, found)
    assert row["sdpa_ms"] == 1 and "speedup_percent" not in row
    assert any(note.startswith("eager failed") and "training" in note for note in found.notes)


def test_serve_drives_ours_and_a_plain_handler(capsys):
    found = quick("serve")
    rows = found.tables[serve.TABLE]
    assert [row["handler"] for row in rows] == ["ours", "plain"]
    assert not [row for row in rows if row["errors"] or not row["clips_per_s"]]
    assert all(row["start_s"] > 0 and row["resident_mb"] > 100 for row in found.tables[serve.WORKERS])
    assert [row["decoders_mb"] > 0 for row in found.tables[serve.WORKERS]] == [True, False]
    assert {row["what"] for row in found.tables[serve.LIMITS]} >= {"the model", "decoding and resizing"}
    printed = capsys.readouterr().out
    assert "p95 ms" in printed and "of limit" in printed
