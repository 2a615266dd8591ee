"""A world of pretended members that serve, asked for tokens."""

from moeplace.runtime.engine.requests import Request
from tests.runtime.service.conductor_world import NEW_TOKENS, World


def serving(ranks: int, *, keep_width: bool = True) -> World:
    """A world in which all ranks serve."""
    world = World(keep_width=keep_width, ranks=ranks)
    world.settle()
    return world


def ask(world: World, name: str = "a", prompt: int = 1) -> str:
    """A request is taken; its ticket."""
    ticket = world.conductor.submit(Request(name, (prompt,), NEW_TOKENS, stop_ids=()))
    world.do(world.conductor.take_actions())
    return ticket


def notes(world: World) -> list[str]:
    """Kinds of the events so far."""
    return [event.kind for event in world.events]
