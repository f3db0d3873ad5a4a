"""A model that draws is asked for no actions."""

from latentray.inference.requests import ActionRequest


def test_a_picture_model_gives_no_actions(client):
    answer = client.post("/v1/actions", json={"observations": {"state": [[1.0]]}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model" and "/v1/images/generations" in answer.json()["error"]["message"]


def test_actions_asked_before_a_promotion_to_a_picture_model_are_refused(loaded):
    (outcome,) = loaded.draw([ActionRequest(observations={}, seed=0, sampler="euler", steps=1)])
    assert outcome.status == 400 and outcome.param == "model"
