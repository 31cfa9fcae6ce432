from __future__ import annotations

import pathlib
import re

import pytest

from fm4m import config as config_lib

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(
        "from fm4m import config\n"
        "def get_config():\n"
        "    c = config.default()\n"
        "    c.train.global_batch = 64\n"
        "    return c\n"
    )
    return str(path)


def refusal(argv, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        config_lib.from_command_line(["train", *argv])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_overrides(good):
    c, workdir = config_lib.from_command_line(
        ["train", f"--config={good}", "--config.train.total=5B tokens", "--config.model.dim=192",
         "--config.data.modules=('a.b',)", "--noconfig.log.tensorboard", "--workdir=/tmp/x"]
    )  # fmt: skip
    assert (c.train.global_batch, c.train.total, c.model.dim, workdir) == (64, "5B tokens", 192, "/tmp/x")
    assert c.data.modules == ("a.b",) and not c.log.tensorboard
    assert config_lib.model_overrides(c) == {"dim": 192}


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("train.global_bach=5", "'train.global_bach'. Did you mean 'train.global_batch'?"),
        ("tran.global_batch=5", "Did you mean 'train.global_batch'?"),
        ("train.global_batch=abc", "train.global_batch = 'abc': expected a value of type int"),
        ("train.global_batch=1.5", "expected a value of type int"),
        ("log.tensorboard=perhaps", "expected a value of type bool"),
        ("model.dim=wide", "model.dim = 'wide': expected a value of type int"),
        ("train.global_batch=0", "train.global_batch = 0: must be at least 1"),
        ("train.accumulation=3", "must be divisible by train.accumulation = 3"),
        ("train.total=5", "train.total = '5' is not a length"),
        ("optimizer.schedule=linear", "must be one of cosine, constant, rsqrt"),
        ("optimizer.b2=1.0", "optimizer.b2 = 1.0: must be in [0, 1)"),
        ("mesh.tensor=-1", "only where the other two axes are given"),
    ],
)
def test_bad_flags_are_one_sentence_and_exit_code_2(good, capsys, flag, expected):
    assert expected in refusal([f"--config={good}", f"--config.{flag}", "--workdir=x"], capsys)


def test_missing_and_unknown_flags(good, capsys):
    assert "--workdir is missing" in refusal([f"--config={good}"], capsys)
    assert "--config is missing" in refusal(["--workdir=x"], capsys)
    assert "workdr" in refusal([f"--config={good}", "--workdr=x"], capsys)
    assert "'surplus' is not a flag" in refusal([f"--config={good}", "--workdir=x", "surplus"], capsys)
    assert "there is no configuration file 'nowhere.py'" in refusal(["--config=nowhere.py", "--workdir=x"], capsys)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c.train.globl_batch = 64", "'globl_batch'. Did you mean 'global_batch'?"),
        ("c.train.global_batch = '64'", "global_batch"),
        ("print(c.trian.total)", "Did you mean 'train'?"),
    ],
)
def test_mistakes_in_a_file_name_its_line(tmp_path, capsys, line, expected):
    path = tmp_path / "bad.py"
    path.write_text(f"from fm4m import config\ndef get_config():\n    c = config.default()\n    {line}\n    return c\n")
    text = refusal([f"--config={path}", "--workdir=x"], capsys)
    assert f"{path}, line 4: " in text and expected in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("def get_config(:\n", "invalid syntax"), ("x = 1\n", "it has no function get_config()"),
     ("def get_config():\n    return {}['get_config']\n", "line 2: get_config"),
     ("from fm4m.tokenizers import train_config\nget_config = train_config.default\n",
      "must return the configuration that fm4m.config.default() gave it")],
)  # fmt: skip
def test_files_that_are_no_configuration(tmp_path, capsys, text, expected):
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert expected in refusal([f"--config={path}", "--workdir=x"], capsys)


# (tokens a sample, batch, total, warm-up, steps, warm-up steps): every released run of the reference implementation.
RELEASED = [
    (256, 8192, "500B", "10B", 239_120, 4_769),
    (512, 4096, "500B", "10B", 239_218, 4_769),
    (512, 4096, "100B", "10B", 48_820, 4_769),
    (512, 8192, "100B", "10B", 24_400, 2_385),
    (512, 4096, "100B", "5B", 48_820, 2_385),
    (2048, 4096, "100B", "5B", 12_205, 597),
]


@pytest.mark.parametrize(("tokens", "batch", "total", "warmup", "steps", "warmup_steps"), RELEASED)
def test_steps_of_the_released_runs(tokens, batch, total, warmup, steps, warmup_steps):
    given = {"global_batch": batch, "tokens_per_sample": tokens}
    epoch = config_lib.REFERENCE_EPOCH_SAMPLES
    assert config_lib.duration_steps(f"{total} tokens", "total", **given, epoch_samples=epoch) == steps
    assert config_lib.duration_steps(f"{warmup} tokens", "warmup", **given) == warmup_steps


def test_other_lengths():
    given = {"global_batch": 100, "tokens_per_sample": 10}
    assert config_lib.duration_steps("1.5K steps", "k", **given) == 1500
    assert config_lib.duration_steps("1 step", "k", **given) == 1
    assert config_lib.duration_steps("201 samples", "k", **given) == 3
    assert config_lib.duration_steps("1_001 tokens", "k", **given) == 2
    with pytest.raises(config_lib.ConfigError, match="k = '0.5 steps' is not a whole number"):
        config_lib.duration_steps("0.5 steps", "k", **given)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations(path):
    c = config_lib.load(str(path))
    config_lib.validate(c)
    text = path.read_text()
    for word in ("Command:", "Cost:", "Expect:"):
        assert re.search(word, text), f"{path.name}'s docstring has no {word}"


@pytest.mark.parametrize("name", ["4m_ti", "4m_s", "4m_b", "4m_l", "4m_xl"])
def test_reference_recipes_build(name):
    import jax

    from fm4m import model, optim, sharding, step
    from fm4m import plan as plans
    from fm4m.masking import Masking, MaskingComponent
    from fm4m.modality_sets import MOD7

    masking = Masking(256, 256, {"*": (MaskingComponent(0.5, 0.5),)})
    c = config_lib.load(str(CONFIGS[0].with_name(f"{name}.py")))
    steps, warmup, cooldown = plans.lengths(c, config_lib.budgets(c, masking))
    assert (steps, warmup, cooldown) == (239_120, 4_769, 0)
    optimizer = optim.from_config(c, steps, warmup, cooldown)
    peak = 6.4e-4 if name == "4m_xl" else 3.2e-3
    assert float(optimizer.schedule(4_768)) == pytest.approx(peak, rel=1e-6)
    sizes = plans.make_model_config(c)
    trunk = {"4m_ti": 24_935_424, "4m_s": 59_000_832, "4m_b": 198_829_056, "4m_l": 705_744_896, "4m_xl": 2_822_971_392}
    assert model.param_counts(sizes, MOD7)["trunk"] == trunk[name]
    state = jax.eval_shape(lambda: step.init_state(c, sizes, MOD7, optimizer))
    sharding.state_shardings(state, sharding.make_mesh(devices=jax.devices()[:1]))
