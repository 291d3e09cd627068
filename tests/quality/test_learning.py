"""What classifiers learn from traffic, and when their answers stand."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from appliance.errors import NotFound, RequestError
from tests.encoders.samples import labelled
from tests.quality.school import TARGET, School, audited, labelled_by, school, stood

pytestmark = pytest.mark.anyio

DAY = 86_400


@pytest.fixture(scope="module")
async def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose classifier knows 300 examples, trained once for all tests that begin with one."""
    home = tmp_path_factory.mktemp("trained")
    async with school(home) as made:
        await made.train(labelled(300))
    return home


def known(home: Path, trained: Path) -> Path:
    shutil.copytree(trained / "classifiers", home / "classifiers")
    return home


async def test_nothing_stands_before_a_threshold_was_estimated(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        assert made.standing().threshold is None
        await made.learning.run_round()
        assert made.standing().threshold is None, "there is no classifier"


async def test_a_node_that_starts_with_a_classifier_knows_its_threshold_before_the_first_text(
    tmp_path: Path, trained: Path
) -> None:
    async with school(known(tmp_path, trained)) as made:
        made.is_served = True
        await made.learning.run_round()
        assert made.standing().threshold is not None


async def test_held_out_rows_give_the_first_threshold_and_audits_overrule_it(tmp_path: Path, trained: Path) -> None:
    async with school(known(tmp_path, trained)) as made:
        made.standing()
        await made.learning.run_round()
        first = made.standing()
        assert first.threshold is not None and "300 held-out and 0 audited texts" in first.reason
        for number in range(80):
            made.see(audited(f"text {number}", "billing", "login" if number % 4 == 0 else "billing", 0.99))
        await made.learning.run_round()
        assert made.standing().threshold is None
        assert "no threshold keeps 5% on 80 audited texts" in made.standing().reason
        assert made.alerts["cascade_unproven"].endswith("every text goes on")
        for number in range(2_000):
            made.see(audited(f"later {number}", "billing", "billing", 0.995))
        await made.learning.run_round()
        assert made.standing().threshold == 0.99, "20 wrong of 2,080 keep the bound even with all of them standing"
        assert "cascade_unproven" not in made.alerts


async def test_too_few_labels_are_said_clearly(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        await made.train(labelled(40))
        made.standing()
        await made.learning.run_round()
        assert made.standing().reason == "too few labels to keep 5%: 40 held-out and 0 audited texts"
        assert made.alerts["cascade_unproven"] == (
            "route 'intents': too few labels to keep 5%: 40 held-out and 0 audited texts; every text goes on"
        )


async def test_a_threshold_of_one_version_is_none_of_another(tmp_path: Path, trained: Path) -> None:
    async with school(known(tmp_path, trained)) as made:
        made.standing()
        await made.learning.run_round()
        assert made.standing(1).threshold is not None
        assert made.standing(2).threshold is None


async def test_feedback_that_calls_sure_answers_wrong_raises_the_threshold(tmp_path: Path, trained: Path) -> None:
    async with school(known(tmp_path, trained)) as made:
        made.standing()
        await made.learning.run_round()
        before = made.standing().threshold
        assert before is not None
        for number in range(40):
            decision = made.see(stood(f"text {number}", "login", before + 0.001))
            told = await made.learning.add_feedback("key-1", decision, 0, "billing", sees_all=False)
            assert told["answered"] == "login"
        await made.learning.run_round()
        after = made.standing().threshold
        assert after is None or after > before


async def test_feedback_is_given_by_the_key_whose_decision_it_was_or_by_an_administrator(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        decision = made.see(stood("text", "login", 0.9))
        with pytest.raises(NotFound):
            await made.learning.add_feedback("key-2", decision, 0, "billing", sees_all=False)
        with pytest.raises(NotFound):
            await made.learning.add_feedback("key-1", decision, 1, "billing", sees_all=False)
        await made.learning.add_feedback("key-2", decision, 0, "billing", sees_all=True)
        assert (await made.learning.store.count_labels(TARGET))["texts"] == 1


async def test_without_keep_texts_no_text_is_written_down(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        made.say(keep_texts=False)
        for number in range(3):
            made.see(audited("", "billing", "login", 0.9))
            decision = made.see(labelled_by("cloud/big", "", "billing", "login"))
            if number == 0:
                await made.learning.add_feedback("key-1", decision, 0, "delivery", sees_all=False)
        await made.learning.run_round()
        counts = await made.learning.store.count_labels(TARGET)
        assert counts == {"labels": 4, "texts": 0, "audited": 3}
        with pytest.raises(RequestError, match="no route keeps texts"):
            await made.learning.add_example("key-1", TARGET, "a secret", "login", "any")


def read(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("learning.sqlite*"))


async def test_a_keys_texts_are_removed_from_the_disk_when_it_says_so(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        made.see(labelled_by("cloud/big", "a text of one about zanzibar", "login", None), owner="one")
        made.see(labelled_by("cloud/big", "a text of two about timbuktu", "login", None), owner="two")
        await made.learning.run_round()
        assert b"zanzibar" in read(tmp_path)
        assert await made.learning.forget_owner("one") == 1
        left = read(tmp_path)
        assert b"zanzibar" not in left and b"timbuktu" in left


async def test_texts_are_removed_after_their_time_and_beyond_their_number(tmp_path: Path) -> None:
    async with school(tmp_path, retention_days=2, max_texts=3) as made:
        made.see(labelled_by("cloud/big", "old", "login", None))
        made.now += 3 * DAY
        for number in range(5):
            made.now += 1
            made.see(labelled_by("cloud/big", f"text {number}", "login", None))
        await made.learning.run_round()
        rows = await made.learning.store.list_texts(TARGET, ["key-1"])
        assert [row.text for row in rows] == ["text 2", "text 3", "text 4"]


async def test_the_file_may_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    async with school(tmp_path):
        assert (tmp_path / "learning.sqlite").stat().st_mode & 0o077 == 0


def _teach(made: School, count: int, seed: int, **more: str) -> None:
    for row in labelled(count, seed):
        made.see(labelled_by("cloud/big", row["text"], row["label"], "delivery"), **more)


@pytest.mark.slow
async def test_a_classifier_is_learned_from_nothing_but_traffic(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        made.say(learn_after=100)
        _teach(made, 99, seed=1, version="none")
        await made.learning.run_round()
        assert (await made.learning.describe_classifier("mail") or {})["learning"]["phase"] == "idle"
        _teach(made, 10, seed=2, version="none")
        await made.learning.run_round()
        assert (await made.learning.describe_classifier("mail") or {})["learning"]["phase"] == "training"
        await made.trained()
        await made.learning.run_round()
        facts = await made.learning.describe_classifier("mail")
        assert facts is not None and facts["news"][0] == "version 1 serves, the first one"
        told = (await made.client.get("/v1/classifiers/mail")).json()
        assert set(told["labels"]) == {"delivery", "billing", "login"}
        assert 70 <= told["report"]["examples"] < 109, "a fifth is kept out"


@pytest.mark.slow
async def test_texts_of_two_keys_are_not_mixed_unless_the_policy_names_them(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        made.say(learn_after=20)
        _teach(made, 30, seed=1, owner="one")
        _teach(made, 30, seed=2, owner="two")
        await made.learning.run_round()
        assert "name the keys in cascade.learn_from" in made.alerts["learning_mixed_keys"]
        assert (await made.client.get("/v1/classifiers/mail/training")).status_code == 404
        with pytest.raises(RequestError, match=r"cascade\.learn_from"):
            await made.learning.start_training("mail")
        made.say(learn_after=20, learn_from=("one",))
        await made.learning.run_round()
        await made.trained()
        assert "learning_mixed_keys" not in made.alerts
        assert (await made.client.get("/v1/classifiers/mail")).json()["report"]["examples"] <= 30


@pytest.mark.slow
async def test_a_better_candidate_is_seen_in_shadow_then_serves_and_is_rolled_back_by_one_call(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        wrong = [{**row, "label": {"billing": "login", "login": "billing"}.get(row["label"], row["label"])}
                 for row in labelled(60)]  # fmt: skip
        await made.train(wrong)
        made.standing()
        _teach(made, 400, seed=1)
        assert (await made.learning.start_training("mail"))["phase"] == "training"
        await made.trained()
        await made.learning.run_round()
        facts = await made.learning.describe_classifier("mail")
        assert facts is not None and facts["learning"] == {"phase": "shadow", "candidate": 2, "tests": 0}
        assert (await made.client.get("/v1/classifiers/mail")).json()["serving"] == 1
        await made.learning.run_round()
        assert (await made.client.get("/v1/classifiers/mail")).json()["serving"] == 1, "no traffic has been seen yet"
        texts = [row["text"] for row in labelled(150, seed=9)]
        await made.shown(texts)
        await made.learning.run_round()
        facts = await made.learning.describe_classifier("mail")
        assert facts is not None and facts["news"][0].startswith("version 2 serves: won ")
        assert "in shadow it differed on" in facts["news"][0]
        assert (await made.client.get("/v1/classifiers/mail")).json()["serving"] == 2
        assert made.standing(2).reason != "no threshold was estimated yet", "it was known before it served"
        assert (await made.client.post("/v1/classifiers/mail/rollback")).json()["serving"] == 1
        await made.learning.run_round()
        assert (await made.client.get("/v1/classifiers/mail")).json()["serving"] == 1, "and stays so"


@pytest.mark.slow
async def test_a_candidate_that_is_no_better_is_removed(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        await made.train(labelled(200))
        made.standing()
        for row in labelled(300, seed=1):
            made.see(labelled_by("cloud/big", row["text"], row["label"], row["label"]))
        await made.learning.start_training("mail")
        await made.trained()
        texts = [row["text"] for row in labelled(150, seed=9)]
        for number in range(8):
            await made.learning.run_round()
            await made.shown(texts)
            for row in labelled(300 * (number + 1), seed=20 + number):
                made.see(labelled_by("cloud/big", row["text"], row["label"], row["label"]))
        facts = await made.learning.describe_classifier("mail")
        assert facts is not None and "is no better and was removed" in facts["news"][0]
        assert (await made.client.get("/v1/classifiers/mail")).json()["versions"] == [1]


async def test_how_far_it_is_survives_a_restart(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        made.say(learn_after=50)
        _teach(made, 60, seed=1)
        await made.learning.run_round()
    async with school(tmp_path) as made:
        made.say(learn_after=50)
        await made.learning.run_round()
        facts = await made.learning.describe_classifier("mail")
        assert facts is not None and facts["news"][0] == "the training came to nothing: the node was restarted"


async def test_local_share_and_agreement_are_told_day_by_day(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        made.see(stood("a", "login", 0.9), labelled_by("cloud/big", "b", "login", "billing", index=1))
        made.see(audited("c", "login", "login", 0.9))
        made.now += DAY
        decision = made.see(audited("d", "login", "billing", 0.9))
        await made.learning.add_feedback("key-1", decision, 0, "billing", sees_all=False)
        facts = await made.learning.describe_classifier("mail")
        assert facts is not None
        first, second = facts["days"]
        assert (first["day"], first["texts"], first["local"], first["local_share"]) == ("2023-11-14", 3, 1, 0.3333)
        assert (first["agreement"], second["agreement"]) == (1.0, 1.0), "what the caller said was right counts"
        assert second["feedback"] == 1


async def test_examples_of_a_bound_request_carry_their_bound(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        made.see(labelled_by("onsite/tiny", "text", "login", "billing"), residency="onsite")
        await made.learning.run_round()
        (row,) = await made.learning.store.list_texts(TARGET, ["key-1"])
        assert row.residency == "onsite"


async def test_a_removed_classifier_leaves_nothing_behind(tmp_path: Path) -> None:
    async with school(tmp_path) as made:
        _teach(made, 10, seed=1)
        await made.learning.run_round()
        await made.learning.forget_classifier("mail")
        with sqlite3.connect(tmp_path / "learning.sqlite") as connection:
            assert connection.execute("select count(*) from labelled").fetchone() == (0,)
        connection.close()
