"""What workers tell a driver: their progress, what is drawn of it, and the error that ends a run."""

import threading
import time

from latentray.training import board as boards
from latentray.training.board import Board, Told


def test_no_more_is_said_than_can_be_drawn_and_the_last_word_always():
    board, said = Board(drawn=True), []
    told = Told(lambda one: (said.append(one), board.say(one)), 100, "diffusion", 8)
    for samples in range(8, 101, 4):
        told.update(samples, loss=1 / samples, restarts=1)
    assert [one["samples"] for one in said] == [8]
    told.close()
    told.close()
    assert [one["samples"] for one in said] == [8, 100]
    assert board.said() == {
        "total_samples": 100, "description": "diffusion", "start_samples": 8, "samples": 100,
        "figures": {"loss": 0.01, "restarts": 1},
    }  # fmt: skip


def test_the_driver_draws_what_the_board_says_and_its_last_word(capsys):
    board, over = Board(drawn=True), threading.Event()
    thread = threading.Thread(target=boards.draw, args=(board.said, over))
    thread.start()
    told = Told(board.say, 100, "diffusion", 0)
    told.update(40, loss=2.0)
    time.sleep(0.8)
    told.update(100, loss=1.0)
    told.close()
    over.set()
    thread.join(5)
    first, last = capsys.readouterr().out.splitlines()
    assert "diffusion   40%  40/100 samples  loss 2 " in first
    assert "diffusion  100%  100/100 samples  loss 1 " in last


def test_a_board_that_does_not_answer_is_asked_again(capsys):
    answers = [None, None, {"total_samples": 8, "description": "x", "start_samples": 0, "samples": 8, "figures": {}}]
    over = threading.Event()

    def ask():
        answer = answers.pop(0)
        if not answers:
            over.set()
            answers.append(answer)
        return answer

    boards.draw(ask, over)
    assert "8/8 samples" in capsys.readouterr().out


def test_a_board_knows_for_how_long_nobody_was_at_work(monkeypatch):
    monkeypatch.setattr(boards, "_SIGN_EVERY_S", 0.05)
    board = Board(drawn=False)
    time.sleep(0.3)
    assert board.idle_s() >= 0.3, "since the launch, where no worker came"
    with boards.at_work(board.sign):
        time.sleep(0.3)
        assert board.idle_s() < 0.25
    time.sleep(0.3)
    assert board.idle_s() >= 0.3


def test_the_first_error_is_the_one_that_counts():
    board = Board(drawn=False)
    assert board.failed() is None and not board.drawn()
    board.fail({"type": "StorageFailed", "what": "full"})
    board.fail({"type": "TrainingFailed", "what": "the others' collectives broke"})
    assert board.failed() == {"type": "StorageFailed", "what": "full"}
