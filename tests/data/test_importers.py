"""Recordings made elsewhere keep every action at its frame."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from nfd_env.config import ConfigError
from nfd_env.data.importers import foreign_minari, import_recordings, open_foreign
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.recipe.game import load_game
from nfd_env.recipe.inspect import write_game
from nfd_env.recipe.look import look
from nfd_env.recipe.run import Recipe
from nfd_env.sources.source import SourceConfig, SourceError, make_source
from nfd_env.video import write_mp4
from tests.counter_env import move, read, record_counter_episodes

ACTIONS = spaces.Discrete(3)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> RecordedDataset:
    folder = tmp_path_factory.mktemp("played")
    record_counter_episodes(folder, 3, length=30)
    return RecordedDataset(folder)


def videos(folder: Path, played: RecordedDataset, kind: str = "csv", rows: int = 30) -> Path:
    folder.mkdir()
    for number, episode in enumerate(played):
        write_mp4(folder / f"{number}.mp4", np.asarray(episode.frames), 25, crf=0, exact=True)
        table = [
            {"action": int(a), "reward": float(r), "terminated": bool(t)}
            for a, r, t in zip(episode.actions, episode.rewards, episode.terminated, strict=True)
        ]
        table = (table + table[:1])[:rows]
        if kind == "csv":
            text = "action,reward,terminated\n"
            text += "".join(f"{x['action']},{x['reward']},{x['terminated']}\n" for x in table)
        elif kind == "parquet":
            pyarrow = pytest.importorskip("pyarrow", reason="pip install 'nfd-env[parquet]'")
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{number}.parquet")
            continue
        else:
            text = "".join(json.dumps(x) + "\n" for x in table)
        (folder / f"{number}.{kind}").write_text(text)
    return folder


def of(folder: Path, **settings: Any) -> SourceConfig:
    given = {"action_space": {"type": "Discrete", "n": 3}}
    return SourceConfig(f"videos:{folder}", kwargs=given, **settings)


def assert_aligned(data: RecordedDataset, lengths: list[int]) -> None:
    assert [len(e) for e in data] == lengths
    for episode in data:
        counter, _ = read(np.asarray(episode.frames))
        assert np.array_equal(np.diff(counter), move(episode.actions))
        assert np.array_equal(episode.rewards, move(episode.actions))


def one_video(folder: Path, text: str, frames: int = 4, size: int = 32, name: str = "a") -> Path:
    folder.mkdir(exist_ok=True)
    pictures = np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(size, 1).repeat(32, 2)
    write_mp4(folder / f"{name}.mp4", pictures.repeat(3, 3), 25)
    (folder / f"{name}.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "ends", "rewards"),
    [
        ("action,terminated\n1,0\n2,0\n0,1\n", True, 0),  # a row for each action
        ("action,terminated\n1,0\n2,0\n0,0\n0,1\n", True, 0),  # a row for each frame
        ("action,truncated\n1,0\n2,0\n0,1\n", False, 0),
        ("action,terminated\n1,0\n2,0\n0,0\n", False, 0),
        ("\ufeffaction, reward, terminated\n1, 1, 0\n2, 2, 0\n0, 3, 1\n", True, 6),
    ],
)
def test_how_a_video_ends(tmp_path: Path, text: str, ends: bool, rewards: float) -> None:
    data = import_recordings(of(one_video(tmp_path / "v", text)), tmp_path / "d")
    (episode,) = data
    assert bool(episode.terminated[-1]) == ends and episode.total_reward == rewards
    assert not episode.terminated[:-1].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("action,terminated\n1,1\n2,0\n0,0\n", r"a.csv: row 1 says terminated, but its video go"),
        ("action,truncated\n1,0\n2,1\n0,0\n", r"a.csv: row 2 says truncated, but its video go"),
        ("action,terminated\n1,nan\n2,0\n0,0\n", r"a.csv: terminated must be 0 or 1 in each row"),
        ("action,reward\n1,nan\n2,0\n0,0\n", r"a.csv: rewards must be finite"),
    ],
)
def test_ends_and_rewards_that_no_episode_has(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        import_recordings(of(one_video(tmp_path / "v", text)), tmp_path / "d")
    assert not (tmp_path / "d" / "dataset.yaml").exists()


def test_a_video_of_one_frame_and_videos_of_two_sizes_are_named(tmp_path: Path) -> None:
    folder = one_video(tmp_path / "v", "action\n1\n", 1)
    with pytest.raises(RecordingError, match=r"a.mp4 has 1 frames; an action lies between two"):
        open_foreign(SourceConfig(f"videos:{folder}"))
    one_video(folder, "action\n1\n1\n1\n")
    one_video(folder, "action\n1\n1\n1\n", size=64, name="b")
    with pytest.raises(RecordingError, match=r"a.mp4 has 32x32, b.mp4 has 64x32.*set source.size"):
        open_foreign(of(folder))
    assert open_foreign(of(folder, size=[32, 32])).frame().shape == (32, 32, 3)


def test_actions_that_are_times_are_refused_at_once(tmp_path: Path) -> None:
    text = "action\n" + "".join(f"{1_700_000_000_000 + i}\n" for i in range(3))
    with pytest.raises(ValueError, match="1700000000003 actions to tell apart"):
        open_foreign(SourceConfig(f"videos:{one_video(tmp_path / 'v', text)}"))


@pytest.mark.parametrize(("kind", "rows"), [("csv", 30), ("jsonl", 31), ("parquet", 30)])
def test_videos_with_actions(tmp_path: Path, played: RecordedDataset, kind: str, rows: int) -> None:
    where = videos(tmp_path / "v", played, kind, rows)
    data = import_recordings(of(where), tmp_path / "d", validation_every=2)
    assert_aligned(data, [30, 30, 30])
    assert data.spec.fps == 25 and data.spec.source["env_id"] == "videos:v"  # no path of ours
    assert [bool(e.terminated[-1]) for e in data] == [True] * 3
    assert {e.policy for e in data} == {"import:0", "import:1", "import:2"}
    data.check(30)
    # Nothing is there twice, and more can be added.
    (where / "9.mp4").write_bytes((where / "0.mp4").read_bytes())
    (where / f"9.{kind}").write_bytes((where / f"0.{kind}").read_bytes())
    again = import_recordings(of(where), tmp_path / "d", validation_every=2)
    assert_aligned(again, [30] * 4)
    with pytest.raises(SourceError, match="no game"):
        make_source(SourceConfig(data.spec.source["env_id"]))


def test_long_recordings_are_cut(tmp_path: Path, played: RecordedDataset) -> None:
    where = videos(tmp_path / "v", played)
    data = import_recordings(of(where), tmp_path / "d", longest=12)
    assert_aligned(data, [12, 12, 6] * 3)
    assert [bool(e.terminated[-1]) for e in data] == [False, False, True] * 3
    assert [bool(e.truncated[-1]) for e in data] == [True, True, False] * 3
    # Into shorter pieces later: what is there is not imported again.
    again = import_recordings(of(where), tmp_path / "d", longest=5)
    assert_aligned(again, [12, 12, 6] * 3)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_import_that_was_stopped_goes_on_in_pieces_of_any_length(
    tmp_path: Path, played: RecordedDataset, kind: str
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    where = videos(tmp_path / "v", played, kind)
    import_recordings(of(where), tmp_path / "d", longest=12)
    *_, last = sorted((tmp_path / "d").glob("shard-*"))
    shutil.rmtree(last)
    have = [len(e) for e in RecordedDataset(tmp_path / "d")]
    again = import_recordings(of(where), tmp_path / "d", longest=5)
    lengths = [len(e) for e in again]
    assert sum(lengths) == 90 and lengths[: len(have)] == have and max(lengths[len(have) :]) <= 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("action\n" + "1\n" * 29, "1.csv has 29 actions, but its video has 31 frames"),
        ("action\n" + "1\n" * 32, "1.csv has 32 actions"),
        ("act\n" + "1\n" * 30, "1.csv has no column 'action', but act"),
        ("action\n" + "1\n" * 29 + "3\n", "1.csv: .*got 3"),
        ("action\n" + "1\n" * 29 + "left\n", "1.csv: .*left"),
        ("action\n" + "1\n" * 29 + "0.5\n", "1.csv: .*integers"),
        ("", "1.csv must have rows"),
    ],
    ids=range(7),
)
def test_tables_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, played: RecordedDataset, text: str, message: str
) -> None:
    where = videos(tmp_path / "v", played)
    (where / "1.csv").write_text(text)
    with pytest.raises(RecordingError, match=message):
        import_recordings(of(where), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_files_that_are_not_there(tmp_path: Path, played: RecordedDataset) -> None:
    with pytest.raises(RecordingError, match="no .mp4"):
        open_foreign(of(tmp_path))
    where = videos(tmp_path / "v", played)
    (where / "2.mp4").write_bytes(b"no video")
    with pytest.raises(RecordingError, match="2.mp4 cannot be read"):
        open_foreign(of(where))
    (where / "1.csv").unlink()
    with pytest.raises(RecordingError, match="1.mp4 needs one file of actions"):
        open_foreign(of(where))


def test_the_action_space_is_told_by_the_actions(tmp_path: Path, played: RecordedDataset) -> None:
    where = videos(tmp_path / "v", played)
    assert open_foreign(SourceConfig(f"videos:{where}")).action_space == ACTIONS
    for table, space in (
        ("a,b\n" + "1,0\n" * 30, spaces.MultiDiscrete([2, 2])),
        ("a,b\n" + "0.5,-1\n" * 30, spaces.Box(-1, 1, (2,), np.float32)),
        ("a,b\n" + "0.5,-1.5\n" * 30, None),
    ):
        for number in range(3):
            (where / f"{number}.csv").write_text(table)
        source = SourceConfig(f"videos:{where}", kwargs={"columns": ["a", "b"]})
        if space is None:
            with pytest.raises(RecordingError, match=r"from -1.5 to 0.5.*action_space"):
                open_foreign(source)
        else:
            assert open_foreign(source).action_space == space
    for wrong, message in (
        ({"column": []}, "source.kwargs.*column"),
        ({"columns": []}, "source.kwargs.columns"),
        ({"action_space": {"type": "Discrete"}}, "action_space cannot be"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_foreign(SourceConfig(f"videos:{where}", kwargs=wrong))


def test_the_recipe_reads_videos(tmp_path: Path, played: RecordedDataset) -> None:
    where = videos(tmp_path / "v", played)
    path, preview = write_game(f"videos:{where}", tmp_path / "v.yaml")
    assert preview.is_file()
    game = load_game(path, [f"folder={tmp_path / 'run'}", "validation_every=2"])
    assert game.name == "v" and game.source.fps == 25 and game.source.env_id == f"videos:{where}"
    assert game.source.kwargs["action_space"]["n"] == 3
    seen = look(game)
    assert seen.frame_size == game.source.size and seen.action_width == 3
    Recipe(game, keep_going=True, progress=False).run("record")
    data = RecordedDataset(game.recordings_place)
    assert [len(e) for e in data] == [30] * 3
    assert list(data.spec.frame_shape[:2]) == game.source.size


def minari(played: RecordedDataset, **changes: Any) -> Any:
    episodes = [
        SimpleNamespace(
            id=i,
            observations=np.asarray(e.frames),
            actions=e.actions,
            rewards=e.rewards,
            terminations=e.terminated,
        )
        for i, e in enumerate(played)
    ]
    vars(episodes[-1]).update(changes)
    return SimpleNamespace(action_space=ACTIONS, iterate_episodes=lambda: iter(episodes))


def test_a_real_minari_data_set(
    tmp_path: Path, played: RecordedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("minari", reason="pip install 'nfd-env[minari]'")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    buffers = [
        library.data_collector.EpisodeBuffer(
            id=number,
            observations=np.asarray(e.frames),
            actions=e.actions,
            rewards=list(e.rewards),
            terminations=list(e.terminated),
            truncations=list(e.truncated),
        )
        for number, e in enumerate(played)
    ]
    made = library.create_dataset_from_buffers(
        "counter/test-v0",
        buffers,
        action_space=ACTIONS,
        observation_space=spaces.Box(0, 255, played.spec.frame_shape, np.uint8),
    )
    assert made is not None
    source = SourceConfig("minari:counter/test-v0", fps=20)
    data = import_recordings(source, tmp_path / "d")
    assert_aligned(data, [30, 30, 30])
    assert data.spec.fps == 20
    assert_aligned(import_recordings(source, tmp_path / "d"), [30, 30, 30])
    with pytest.raises(RecordingError, match="no Minari data set 'other/test-v0'"):
        open_foreign(SourceConfig("minari:other/test-v0"))
    with pytest.raises(ConfigError, match="knows none, got .'n'"):
        open_foreign(SourceConfig("minari:counter/test-v0", kwargs={"n": 1}))


def test_what_minari_may_hold(played: RecordedDataset) -> None:
    for wrong, message in (
        ({"observations": np.zeros((31, 4))}, r"episode 2: frames must be uint8"),
        ({"observations": {"x": 1}}, "episode 2: observations are no frames"),
        ({"actions": np.zeros(7, int)}, "episode 2: 31 frames do not fit 7 actions"),
    ):
        found = foreign_minari(minari(played, **wrong), SourceConfig("minari:x"))
        with pytest.raises(RecordingError, match=message):
            for recording in found.recordings():
                list(recording.frames)
