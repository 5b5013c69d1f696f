"""Trackers: what they get, failures, and each library's own files. Oracles: the run's record; the libraries' readers."""

import importlib
import json
import struct
import warnings

import pytest

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.registry import TRACKERS
from lownibble.training import Evaluated, Sink, Stepped, run
from lownibble.training.trackers import Tracker, Trackers
from lownibble.training.trackers.mlflow import MLflow

DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}
RUNS = []


class _Notes(Tracker):
    """Keeps all it is told."""

    module = "json"

    def __init__(self, about):
        self.about, self.figures, self.ended = about, [], None
        RUNS.append(self)

    def log(self, figures, step):
        self.figures.append((step, figures))

    def end(self, status, files):
        self.ended = (status, [path.name for path in files])
        self.present = all(path.exists() for path in files)


class _Noisy(_Notes):
    """Prints, and its server goes away."""

    def log(self, figures, step):
        print("for a person")
        if step == 2:
            raise ConnectionError("the server\nis gone")
        super().log(figures, step)


class _Absent(_Notes):
    module = "a_library_that_is_not_there"


TRACKERS.add("notes", _Notes)
TRACKERS.add("noisy", _Noisy)
TRACKERS.add("absent", _Absent)


@pytest.fixture
def config(tiny_model, tiny_data, tmp_path):
    RUNS.clear()

    def make(*names, **options):
        train = {"max_steps": 3, "batch_size": 8, "max_length": 32, "save_steps": 1, "output_dir": str(tmp_path / "out")}
        return RunConfig(
            model=str(tiny_model), method="lora", data=DataConfig(path=str(tiny_data), **DATA), lora=LoraConfig(r=4),
            train=TrainConfig(report_to=list(names), **train | options),
        )  # fmt: skip

    return make


def test_several_get_figures_options_and_the_record(config, tmp_path):
    result = run(config("notes", "tensorboard"))
    notes = RUNS[0]
    assert [f["train/loss"] for _, f in notes.figures if "train/loss" in f] == result.losses
    assert [step for step, f in notes.figures if "train/loss" in f] == [1, 2, 3]
    evaluated = [(step, f["eval/loss"], f["eval/accuracy"]) for step, f in notes.figures if "eval/loss" in f]
    assert evaluated == [(e["step"], e["loss"], e["scores"]["accuracy"]) for e in result.record["evaluations"]]
    assert notes.about.options["train.max_steps"] == 3
    assert notes.about.name == "out"
    assert notes.ended == ("finished", ["record.json", "adapter"])
    assert notes.present, "it ends when the files are written"

    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx(result.losses, rel=1e-6)
    assert {"eval/loss", "eval/accuracy"} <= set(found.Tags()["scalars"])
    assert b'"max_steps": 3' in found.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_one_that_fails_is_dropped_and_the_run_goes_on(config, capsys):
    with pytest.warns(UserWarning, match=r"reporting to noisy failed \(ConnectionError: the server is gone\); the run goes on"):
        result = run(config("noisy", "notes"))
    assert len(result.losses) == 3
    assert any("noisy" in told for told in result.record["warnings"])
    assert capsys.readouterr().out == "", "standard output is the command's"
    noisy, notes = RUNS
    assert len(noisy.figures) < len(notes.figures)
    assert noisy.ended == ("failed", [])
    assert notes.ended[0] == "finished"


def test_mlflow_ends_its_run_when_figures_were_not_taken(tmp_path):
    done = []

    class Client:
        def log_artifact(self, run, path):
            done.append(path)

        def set_terminated(self, run, status):
            done.append(status)

    class Lost:
        def wait(self):
            raise ConnectionError("figures lost")

    tracker = object.__new__(MLflow)
    tracker.client, tracker.id, tracker.sent = Client(), "1", [Lost()]
    with pytest.raises(ConnectionError, match="figures lost"):
        tracker.end("finished", [tmp_path / "record.json"])
    assert done == [str(tmp_path / "record.json"), "FINISHED"]


def test_a_resumed_run_goes_on_with_its_curves(config):
    class Stop(Sink):
        def __call__(self, event):
            if isinstance(event, Stepped) and event.step == 2:
                raise KeyboardInterrupt

    cut = config("notes")
    with pytest.raises(KeyboardInterrupt):
        run(cut, sinks=[Stop()])
    assert RUNS[0].ended == ("killed", [])
    run(cut.with_options(train=cut.train.with_options(resume=True, max_steps=3, report_to=["notes", "tensorboard"])))
    first, second = (notes.about for notes in RUNS)
    assert (first.id, second.resumed) == (second.id, True)
    assert not first.resumed


def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(config):
    nowhere = config("absent").with_options(model="/no/such/model")
    with pytest.raises(ConfigError, match=r"'absent', which cannot be imported: .*pip install 'lownibble\[absent\]'"):
        run(nowhere)
    with pytest.raises(ConfigError, match="'tensorboard', which writes into the output folder"):
        run(config("tensorboard", output_dir=None).with_options(model="/no/such/model"))
    with pytest.raises(ConfigError, match="'report_to' of TrainConfig must be a list of one of 'tensorboard', 'wandb', 'mlflow'"):
        TrainConfig(report_to=["notes", "nots"])


def test_one_name_and_none_are_taken_as_in_transformers(tiny_model):
    assert TrainConfig(report_to="wandb").report_to == ["wandb"]
    assert TrainConfig(report_to="none") == TrainConfig()
    model, tokenizer = ln.load(str(tiny_model))
    with pytest.raises(ConfigError, match="'absent'"):
        ln.train(model, tokenizer, DataConfig(), TrainConfig(report_to="absent"))


def _wandb(folder):
    """(losses, options, artifacts) of wandb's offline file: records in LevelDB's log format, in blocks of 32 KiB."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process flushes the file when it ends
    losses, options, kept, whole, at = [], {}, [], b"", 7
    data = next((folder / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # goes on in the next block
            continue
        record, whole = Record.FromString(whole), b""
        row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        losses += [(row["train/global_step"], row["train/loss"])] if "train/loss" in row else []
        options |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        kept += [entry.path for entry in record.artifact.manifest.contents]
    return losses, options["train"]["max_steps"], sorted(kept)


def _mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("lownibble").experiment_id])
    assert found.info.status == "FINISHED"
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "train/loss")]
    kept = [file.path for at in ("", "adapter") for file in client.list_artifacts(found.info.run_id, at) if not file.is_dir]
    return losses, int(found.data.params["train.max_steps"]), sorted(kept)


def _trackio(folder):
    import trackio

    (found,) = trackio.Api().runs("lownibble")
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("lownibble", found.name)
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    with trackio.sqlite_storage.SQLiteStorage._get_connection(next((folder / "trackio").glob("*.db"))) as database:
        (manifest,) = [row[0] for row in database.execute("select manifest from artifact_versions")]
    return losses, found.config["train"]["max_steps"], sorted(entry["path"] for entry in json.loads(manifest))


def _swanlab(folder):
    (where,) = (folder / "swanlog").glob("run-*")
    data = next(where.glob("*.swanlab")).read_bytes()
    assert b"train/loss" in data
    assert b"record.json" in data
    assert b"adapter_config.json" in data
    assert "max_steps" in (where / "files" / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # of their own making
@pytest.mark.parametrize(("name", "read"), [("wandb", _wandb), ("mlflow", _mlflow), ("trackio", _trackio), ("swanlab", _swanlab)])
def test_each_library_keeps_what_it_is_told(name, read, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'lownibble[{name}]'", exc_type=ImportError)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "record.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="reporting to")
        with Trackers([name], {"model": "m", "train": {"max_steps": 2}}, tmp_path) as trackers:
            for step in (1, 2):
                trackers(Stepped(step, 0.5 * step, 1e-4, 1.0, 10, 12, 5, 2, 0.1))
            trackers(Evaluated(2, 0.25, 5, 0.1, {"accuracy": 0.5}))
            trackers.finish("finished", [tmp_path / "record.json", tmp_path / "adapter"])
    assert trackers.failures == []
    assert json.loads((tmp_path / "trackers.json").read_text())[name]
    if found := read(tmp_path):
        losses, steps, kept = found
        assert losses == [(1, 0.5), (2, 1.0)]
        assert steps == 2
        assert kept == ["adapter/adapter_config.json", "record.json"]
