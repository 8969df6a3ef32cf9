"""The shop (Flask): takes an order, for which it asks the stock three things over one connection. Knows of no trace."""

import os
from typing import Any

import flask
import requests

TIMEOUT_S = 30

app = flask.Flask("shop")
stock = requests.Session()
stock_url = os.environ["DEMO_STOCK_URL"]


def ask(method: str, path: str) -> requests.Response:
    answer = stock.request(method, stock_url + path, timeout=TIMEOUT_S)
    answer.raise_for_status()
    return answer


@app.post("/orders")
def order() -> tuple[dict[str, Any], int]:
    item = ask("GET", "/items").json()[0]["name"]
    ask("POST", f"/reservations/{item}")
    return {"item": item, "left": ask("GET", f"/items/{item}").json()["left"]}, 201
