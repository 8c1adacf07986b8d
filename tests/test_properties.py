"""What holds of any data, in every spelling: readers, splits, stores, configs of checkpoints."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import pytest
import test_names
from PIL import Image

from mstar_jax import models, store
from mstar_jax.data import mathv360k, splits, turns
from mstar_jax.data.pictures import content
from mstar_jax.structs import Query, Response

FEW = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)

# ---- 1. rows ------------------------------------------------------------------------------------------

WORDS = st.text("abcdefgh ", min_size=1, max_size=12).map(lambda text: " ".join(text.split()) or "x")
OPTIONS = st.lists(WORDS.filter(lambda text: len(text) > 1), min_size=2, max_size=5, unique=True)
FIELDS = ("image", "images", "Image", "image_path", "image_paths", "img", "image_file")
LISTS = (  # heading, an option's form, what is between two options
    *(("Choices:\n", "({}) {}", "\n"), ("Options:\n", "{}. {}", "\n"), ("**Choices:**\n", "{}) {}", "\n")),
    *(("choices: ", "({}) {}", " "), ("Options: ", "{}. {}", ", "), ("选项：\n", "（{}）{}", "\n")),
    *(("", "({}) {}", "\n"), ("", "{}. {}", "\n"), ("Choices:\n", "[{}] {}", "\n"), ("", "- {}. {}", "\n")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures; two of them have the same content."""
    root = tmp_path_factory.mktemp("data")
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue"), ("d", "red")):
        Image.new("RGB", (8, 8), color).save(root / f"{name}.png")
    return root


def read(folder, rows, **values):
    (folder / "rows.json").write_text(json.dumps(rows))
    return mathv360k.read(folder / "rows.json", folder, **values)


@FEW
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from("abc"), WORDS, st.integers(0, 99)), min_size=1, max_size=5),
    st.sampled_from(FIELDS),
    st.booleans(),
    st.sampled_from((("from", "value", "human", "gpt"), ("role", "content", "user", "assistant"))),
    st.sampled_from(("", "<image>\n", "<IMAGE>\n", "<image 1>\n", "<|image_1|>\n")),
)
def test_rows_are_the_same_in_every_spelling(folder, made, field, several, names, mark):
    speaker, said, human, gpt = names
    plain, spelled = [], []
    for name, question, answer in made:
        turns = [("human", f"<image>\n{question}"), ("gpt", str(answer))]
        plain.append(
            {
                "id": "q",
                "image": f"{name}.png",
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
        turns = [(human, mark + question), (gpt, f"The answer is {answer}.")]
        path = f"{name}.png"
        spelled.append(
            {
                "id": "q",
                field: [path] if several else path,
                "conversations": [{speaker: who, said: text} for who, text in turns],
            }
        )
    expected, report = read(folder, plain)
    found, other = read(folder, spelled)
    assert found == expected and (report.kept, report.dropped) == (other.kept, other.dropped)


@FEW
@hypothesis.given(WORDS, OPTIONS, st.sampled_from(LISTS), st.integers(0, 4), st.booleans())
def test_options_are_the_same_in_every_spelling(question, options, form, at, small):
    heading, option, between = form
    letters = "ABCDE"[: len(options)]
    hypothesis.assume(not turns._INSTRUCTION.search(options[-1]))
    listed = between.join(option.format(letter, text) for letter, text in zip(letters, options))
    asked, found, _ = turns.parse_question(f"{question}?\n{heading}{listed}")
    assert (asked, found) == (f"{question}?", tuple(options))
    gold = letters[at % len(options)]
    text = options[at % len(options)]
    for said in (
        gold,
        f"({gold})",
        f"{gold}. {text}",
        f"The answer is {gold.lower() if small else gold}",
        text,
    ):
        assert turns.parse_answer(said, found) == (gold, "choice"), said


# ---- 2. splits ----------------------------------------------------------------------------------------


@FEW
@hypothesis.given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=2), min_size=12, max_size=40), st.integers(0, 99)
)
def test_splits_share_no_picture(folder, pictures, seed):
    """Whatever the names of a picture are: a and d are the same one."""
    queries = [
        Query(f"q{i}", tuple(str(folder / f"{name}.png") for name in names), f"{i}?", answer="1")
        for i, names in enumerate(pictures)
    ]
    try:
        parts = splits.split(queries, seed=seed, validation=2, test=2)
    except ValueError as error:
        assert "queries wanted" in str(error)  # too few that share no picture
        return
    seen = {
        name: {content(image) for query in part for image in query.images} for name, part in parts.items()
    }
    for one in seen:
        for other in seen:
            assert one == other or not seen[one] & seen[other]
    ids = [query.id for part in parts.values() for query in part]
    assert len(ids) == len(set(ids))


# ---- 3. stores ----------------------------------------------------------------------------------------


def asked(number):
    return "asked"


def shard(folder, texts):
    queries = [Query(f"q{i}", (), "?", answer="1") for i in range(len(texts))]
    made = store.Store(folder, {"seed": 0})
    made.write(
        0,
        [
            store.line(store.rollout(query, [Response(query.id, 0, text, (1,), 0.0, False)]))
            for query, text in zip(queries, texts)
        ],
        asked,
    )
    return made, (folder / "00000.jsonl").read_bytes()


@FEW
@hypothesis.given(st.lists(st.text(max_size=20), min_size=1, max_size=4), st.data())
def test_any_damage_to_a_shard_is_detected(tmp_path, texts, data):
    """Cut anywhere, a byte flipped, a line doubled or dropped."""
    made, whole = shard(tmp_path, texts)
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= data.draw(st.integers(1, 255))
    lines = whole.splitlines(keepends=True)
    assert made.missing(1, asked) == []
    for damaged in (whole[:at], bytes(flipped), whole + lines[-1], b"".join(lines[1:]), whole[:-1]):
        (tmp_path / "00000.jsonl").write_bytes(damaged)
        assert store.Store(tmp_path, {"seed": 0}).missing(1, asked) == [0]
    (tmp_path / "00000.jsonl").write_bytes(whole)
    assert [query for query, _ in made.read(1, store.read_rollout)] == [f"q{i}" for i in range(len(texts))]


# ---- 4. configs of checkpoints ------------------------------------------------------------------------

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
NO_SIZE = st.one_of(
    st.integers(max_value=0),
    st.floats(),
    st.text(max_size=4),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
)
NO_CONSTANT = st.one_of(
    st.floats(max_value=0), st.sampled_from((float("nan"), float("inf"))), st.text(max_size=4), st.booleans()
)


@FEW
@hypothesis.given(
    st.sampled_from(sorted(test_names.FAMILIES)),
    st.one_of(
        st.tuples(st.sampled_from((*SIZES, "max_position_embeddings")), NO_SIZE),
        st.tuples(st.sampled_from(("rms_norm_eps", "rope_theta")), NO_CONSTANT),
    ),
)
def test_values_that_are_no_sizes_are_refused_by_name(tmp_path, name, changed):
    key, value = changed
    with pytest.raises(ValueError, match=f"config.json.*{key}"):
        test_names.read(name, tmp_path, lambda values: test_names.decoder_of(values).update({key: value}))


def test_the_values_of_the_small_checkpoints_are_sizes(tmp_path):
    for name, (family, config) in test_names.FAMILIES.items():
        assert test_names.read(name, tmp_path) == config
        assert dataclasses.is_dataclass(models.Pretrained(tmp_path).config) and family.FAMILY
