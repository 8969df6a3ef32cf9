"""The stock (FastAPI): a list of items that takes several packets, a reservation whose answer takes one."""

import fastapi
from pydantic import BaseModel


class Item(BaseModel):
    """What there is of something."""

    name: str
    left: int
    description: str


NAMES = ("coffee", "tea", "cocoa", "sugar", "honey", "lemons", "biscuits", "cups")
app = fastapi.FastAPI()
items = {name: Item(name=name, left=10, description=f"{name}, by the crate. " * 50) for name in NAMES}


@app.get("/items")
def catalogue() -> list[Item]:
    return list(items.values())


@app.get("/items/{name}")
def item(name: str) -> Item:
    return items[name]


@app.post("/reservations/{name}", status_code=204)
def reserve(name: str) -> None:
    items[name].left -= 1
