"""Which records count as the same: by hand-made cases, against all pairs compared in full, and on pictures that were changed."""

from __future__ import annotations

import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from prism_nemo.config.endpoint import CurationConfig
from prism_nemo.curate.comparing import find_overlap
from prism_nemo.curate.duplicates import Benchmarks, Duplicates, Prompts, same_picture
from prism_nemo.curate.fingerprints import Fingerprint, image_fingerprint, normalized, numbers, shingles, similarity
from prism_nemo.data.records import ImageSource, Record

LONG = "a train leaves the station at noon and travels north while another one leaves the harbour and travels south"


def fingerprint(prompt: str, *pictures: tuple[str, str]) -> Fingerprint:
    return Fingerprint(normalized(prompt), pictures)


def encoded(image: Image.Image, form: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image.open(buffer).convert("RGB")


# Prompts


def test_prompts_are_compared_without_what_does_not_matter() -> None:
    assert normalized("<image>\n How  MANY\tcats？ <image>") == "how many cats?"
    assert normalized("ﬁnd ½") == "find 1⁄2"
    assert numbers("3 of 1,000 and 2.5") == ("3", "1,000", "2.5")


def test_similarity_by_hand() -> None:
    one, other = shingles("a b c d e"), shingles("a b c d f")
    assert one == {("a", "b", "c"), ("b", "c", "d"), ("c", "d", "e")}
    assert similarity(one, other) == 2 / 4
    assert shingles("a b") == {("a", "b")} and shingles("") == {()}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (LONG, LONG.upper() + " ", True),
        (LONG, LONG + "?", True),
        (LONG + " with 3 coaches", LONG + " with 4 coaches", False),
        ("What is 12 + 35?", "What is 12 + 36?", False),
        ("Which of these is right?", "Which of these is not right?", False),
        ("", "", True),
        ("x", "y", False),
    ],
)
def test_near_prompts(first: str, second: str, same: bool) -> None:
    known = Duplicates(CurationConfig())
    assert known.first_like("first", fingerprint(first)) is None
    assert known.first_like("second", fingerprint(second)) == ("first" if same else None)


def test_near_prompts_are_found_as_if_all_were_compared() -> None:
    """Random prompts with copies that were changed in up to three of forty words, beside all pairs in full."""
    generator = random.Random(0)
    vocabulary = ["".join(generator.choices("abcdefgh", k=6)) for _ in range(2000)]
    texts = []
    for _ in range(150):
        sentence = generator.choices(vocabulary, k=40)
        texts.append(" ".join(sentence))
        for place in generator.sample(range(40), generator.randrange(4)):
            sentence[place] = generator.choice(vocabulary)
        texts.append(" ".join(sentence))
    prompts, missed, found = Prompts(0.8), 0, 0
    for number, text in enumerate(texts):
        near = prompts.near(text)
        expected = [other for other in range(number) if similarity(shingles(text), shingles(texts[other])) >= 0.8]
        assert set(near) <= {prompts.add(texts[other]) for other in expected}
        missed += len({prompts.add(texts[other]) for other in expected} - set(near))
        found += len(near)
        prompts.add(text)
    assert found > 60 and missed == 0


# Pictures


def photographs() -> list[Image.Image]:
    return [Image.fromarray(array) for array in load_sample_images().images]


def test_a_picture_is_the_same_however_it_is_stored() -> None:
    for photograph in photographs():
        own = image_fingerprint(photograph)
        assert (
            image_fingerprint(encoded(photograph, "PNG")) == own == image_fingerprint(encoded(photograph, "WEBP", lossless=True))
        )
        for changed in (
            encoded(photograph, "JPEG", quality=85),
            encoded(photograph, "JPEG", quality=40),
            photograph.resize((photograph.width // 2, photograph.height // 2)),
            photograph.resize((photograph.width * 3 // 2, photograph.height * 3 // 2)),
            encoded(photograph.resize((300, 200)), "JPEG", quality=75),
        ):
            assert image_fingerprint(changed)[0] != own[0]
            assert same_picture(image_fingerprint(changed), own, 6)
        for other in (photograph.crop((60, 0, photograph.width, photograph.height)), photograph.transpose(Image.Transpose(0))):
            assert not same_picture(image_fingerprint(other), own, 6)
    first, second = map(image_fingerprint, photographs())
    assert not same_picture(first, second, 7)


def test_pictures_with_little_on_them_are_the_same_only_by_their_pixels() -> None:
    pages = []
    for dots in range(3):
        page = np.full((200, 200, 3), 255, dtype=np.uint8)
        page[50 + 20 * dots, 50:150] = 0
        pages.append(image_fingerprint(Image.fromarray(page)))
    assert all(page[1] == "" for page in pages)
    assert not any(same_picture(one, other, 7) for one, other in itertools.combinations(pages, 2))
    assert same_picture(pages[0], pages[0], 0)


def test_near_pictures_are_found_as_if_all_were_compared() -> None:
    """Random hashes with up to 9 bits turned over: exactly those within the distance, whichever bits they are."""
    generator = random.Random(1)
    for distance in range(8):
        known, pictures = Duplicates(CurationConfig(max_image_distance=distance)), []
        for number in range(150):
            if number % 3 and pictures:
                bits = int(generator.choice(pictures)[1], 16)
                for place in generator.sample(range(256), generator.randrange(10)):
                    bits ^= 1 << place
            else:
                bits = generator.getrandbits(256)
            picture = (f"pixels {number}", f"{bits:064x}")
            like = known.first_like(str(number), fingerprint("what is this", picture))
            near = [earlier for earlier in pictures if same_picture(earlier, picture, distance)]
            assert (like is not None) == bool(near)
            assert like is None or f"pixels {like}" == near[0][0]
            if like is None:
                pictures.append(picture)


def test_records_with_several_pictures() -> None:
    a, b, c = (("a", ""), ("b", ""), ("c", ""))
    known = Duplicates(CurationConfig())
    assert known.first_like("1", fingerprint("compare", a, b)) is None
    for pictures in ((b, a), (a,), (a, b, c), (a, c), ()):
        assert known.first_like(str(pictures), fingerprint("compare", *pictures)) is None
    assert known.first_like("2", fingerprint("Compare", a, b)) == "1"
    assert known.first_like("3", fingerprint("describe both", a, b)) is None


# Benchmarks


def overlap(benchmark: Fingerprint, prompt: Fingerprint, **settings: float) -> str | None:
    known = Benchmarks(CurationConfig(**settings))
    known.add("bench", benchmark)
    found = known.overlap(prompt)
    assert found is None or found[1] == "bench"
    return None if found is None else found[0]


def test_what_counts_as_overlap() -> None:
    a, b = ("a", ""), ("b", "")
    assert overlap(fingerprint("why?", a), fingerprint("how many?", b, a)) == "benchmark image"
    assert overlap(fingerprint("why?", a), fingerprint("why?", b)) is None, "a short question about another picture"
    assert overlap(fingerprint(LONG, a), fingerprint(LONG + ".", b)) == "benchmark prompt"
    assert overlap(fingerprint(LONG, a), fingerprint(LONG, b), exclude_min_words=50) is None
    assert overlap(fingerprint("what is 2 + 2?"), fingerprint("What is 2 + 2?")) == "benchmark prompt"
    assert overlap(fingerprint("what is 2 + 2?"), fingerprint("What is 2 + 3?")) is None
    assert overlap(fingerprint("what is this?", a), fingerprint("what is this?")) is None


def test_the_first_of_several_stays_and_reasons_name_what_it_is_like() -> None:
    records = [Record(id=name, prompt="?") for name in "abcde"]
    prompts = ["what is 1 + 1?", "what is 2 + 2?", "What is 1 + 1?", "what is 3 + 3?", "what is 2 + 2 ?"]
    rows = [{"record": number, "fingerprint": fingerprint(prompt).to_json()} for number, prompt in enumerate(prompts)]
    benchmark = [("bench 7", fingerprint("what is 3 + 3?"))]
    expected = {2: ("duplicate", "a"), 3: ("benchmark prompt", "bench 7"), 4: ("duplicate", "b")}
    assert find_overlap(rows, records, benchmark, CurationConfig()) == expected
    assert find_overlap(rows, records, benchmark, CurationConfig(deduplicate=False)) == {3: expected[3]}


def test_a_record_of_bytes_and_one_of_a_file_are_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    photograph = photographs()[0].resize((64, 48))
    photograph.save(tmp_path / "a.png")
    by_path = Record(id="1", prompt="<image>Why?", images=(ImageSource(path=tmp_path / "a.png"),), image_root=tmp_path)
    by_bytes = Record(id="2", prompt="why? <image>", images=(ImageSource(data=(tmp_path / "a.png").read_bytes()),))
    assert Fingerprint.of(by_path) == Fingerprint.of(by_bytes) == Fingerprint.from_json(Fingerprint.of(by_path).to_json())
