"""What the Prefect server itself does with our runs: it finds dead ones, starts them again, and tells people.

Shipped as code: `ship` makes each automation once and renews it where this file changed; whether one is switched off
is a person's choice and stays. Notifications go to the block named `dit-notify`, of any notification type (Slack,
e-mail, a webhook, ...); without it there are none.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture

from flows import events
from flows.deploy import NOTIFY_BLOCK as BLOCK
from flows.lost import AGAIN, RESTARTS

FLOWS = ("train-dit", "retrain", "study")
NAME = "dit: "  # before each automation's name: by it ours are known
# Three heartbeats of 180 s: one that comes late is no death.
SILENT_SECONDS = 540
# From a crash to the next start. A worker tells of the crash a moment before it gives the run's place free, and ends
# with an error where the same run comes back in between.
PAUSE_SECONDS = 15
STALLED_SECONDS = 30 * 60
NOTHING_NEW_DAYS = 14
# Every name that a run of ours can end with: Prefect tells a run's end by an event of the state's name.
ENDS = (
    *("Completed", "Cached", "NothingNew", "AlreadyQueued", "Failed", "Interrupted", "Lost", "Incomplete", "NotPushed"),
    *("TimedOut", "Crashed", "Cancelled"),
)

BEGINNINGS = ("Scheduled", AGAIN, "Late", "Pending", "Running")

_HEARTBEAT = "prefect.flow-run.heartbeat"
_OF_OUR_FLOWS = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
_OF_A_DEPLOYMENT = {"prefect.resource.role": "deployment"}  # only these can a worker start again


def ship(watched: Sequence[str] = ()) -> list[str]:
    """Make and renew the automations on the configured server; returns lines for a person.

    Args:
        watched: data sets of which it is told when nothing new comes.
    """
    said = []
    with get_client(sync_client=True) as client:
        wanted = {one.name: one for one in [*survival(), *_notifications(client, watched, said)]}
        found: dict[str, Automation] = {}
        off = set()
        for one in _ours(client):
            off |= set() if one.enabled else {one.name}
            if one.name not in wanted or one.name in found:  # another of this name: two deploys at once
                client.delete_automation(one.id)
            else:
                found[one.name] = one
        for name, one in wanted.items():
            renewed = AutomationCore(**one.model_dump(exclude={"owner_resource", "enabled"}), enabled=name not in off)
            if name not in found:
                client.create_automation(one)
            elif _essence(found[name]) != _essence(renewed):
                client.update_automation(found[name].id, renewed)
    return said


def survival(silent_seconds: float = SILENT_SECONDS, pause_seconds: float = PAUSE_SECONDS) -> list[AutomationCore]:
    """A run that nobody works on any more is marked as crashed, and a crashed run is started again where it stopped."""
    zombies = EventTrigger(
        after={_HEARTBEAT},
        expect={_HEARTBEAT, *(f"prefect.flow-run.{name}" for name in ENDS)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=_OF_OUR_FLOWS,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=silent_seconds),
    )
    crashed = EventTrigger(
        after={"prefect.flow-run.Crashed"},
        expect={f"prefect.flow-run.{name}" for name in (*BEGINNINGS, *ENDS) if name != "Crashed"},
        # Counted by the server. A run that crashed before it had begun (0) would do so for ever.
        match={
            "prefect.resource.id": "prefect.flow-run.*",
            "prefect.run-count": [str(count) for count in range(1, RESTARTS + 1)],
        },
        match_related=[_OF_OUR_FLOWS, _OF_A_DEPLOYMENT],
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=pause_seconds),
    )
    return [
        AutomationCore(
            name=f"{NAME}a run that gives no sign of life has crashed",
            description=f"No heartbeat for {silent_seconds:g} s: its process, its worker or its machine is gone.",
            trigger=zombies,
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED, message=f"no sign of life for {silent_seconds:g} s: its process is gone"
                )
            ],
        ),
        AutomationCore(
            name=f"{NAME}a crashed run starts again",
            description=f"At most {RESTARTS} times; its stage goes on where it stopped. To end a run, cancel it.",
            trigger=crashed,
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name=AGAIN,
                    message="it crashed: a worker takes it up again where it stopped",
                )
            ],
        ),
    ]


def notifications(
    block: Any,
    watched: Iterable[str],
    *,
    stalled_seconds: float = STALLED_SECONDS,
    quiet_days: float = NOTHING_NEW_DAYS,
) -> list[AutomationCore]:
    """What people are told, through a block document that can notify or is a webhook.

    Raises ValueError where it is neither.
    """
    run = "{{ flow.name }} {{ flow_run.name }}"
    news = [
        (
            "a run failed or crashed",
            EventTrigger(
                expect={"prefect.flow-run.*"},
                match={"prefect.resource.id": "prefect.flow-run.*", "prefect.state-type": ["FAILED", "CRASHED"]},
                match_related=_OF_OUR_FLOWS,
            ),
            f"{run}: {{{{ flow_run.state.name }}}}",
            "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
        ),
        (
            "a run stalls",
            EventTrigger(
                after={events.RUN_PROGRESS},
                expect={events.RUN_PROGRESS, events.RUN_IDLE},
                match={"prefect.resource.id": events.run("*")},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=stalled_seconds),
            ),
            "a run stalls",
            f"{{{{ event.resource.id }}}} has told no progress for {stalled_seconds / 60:g} minutes",
        ),
        (
            "a new champion",
            EventTrigger(expect={events.MODEL_CHAMPION}, match={"prefect.resource.id": events.model("*")}),
            "new champion: {{ event.resource.name }} version {{ event.payload.version }}",
            "{{ event.payload.metric }} {{ event.payload.value }}",
        ),
        *(
            (
                f"nothing new of {name}",
                EventTrigger(
                    expect={events.DATA_NEW},
                    match={"prefect.resource.id": events.dataset(name)},
                    posture=Posture.Proactive,
                    threshold=1,
                    within=timedelta(days=quiet_days),
                ),
                f"nothing new of {name}",
                f"no new images of {name} for {quiet_days:g} days",
            )
            for name in watched
        ),
    ]
    return [
        AutomationCore(
            name=f"{NAME}tell: {title}",
            description=f"By the block {BLOCK}; made and removed with it.",
            trigger=trigger,
            actions=[_action(block, subject, body)],
        )
        for title, trigger, subject, body in news
    ]


def _action(block: Any, subject: str, body: str) -> Any:
    kind, capable = block.block_type.slug, block.block_schema.capabilities if block.block_schema else []
    if "notify" in capable:
        return SendNotification(block_document_id=block.id, subject=subject, body=body)
    if kind == "webhook":
        return CallWebhook(block_document_id=block.id, payload=f"{subject}\n{body}")
    raise ValueError(f"the block {BLOCK} is of type {kind}, which can't notify: make one of another type of that name")


def _notifications(client: SyncPrefectClient, watched: Iterable[str], said: list[str]) -> list[AutomationCore]:
    found = [block for block in client.read_block_documents(limit=200) if block.name == BLOCK]
    if not found:
        return []
    said.append(f"notify by    the block {BLOCK} ({found[0].block_type.slug})")
    if len(found) > 1:
        said.append(
            f"notify by    others named {BLOCK} are not used: " + ", ".join(b.block_type.slug for b in found[1:])
        )
    return notifications(found[0], watched)


def _ours(client: SyncPrefectClient) -> list[Automation]:
    found: list[Automation] = []
    while page := client.read_automations(limit=200, offset=len(found)):
        found += page
    return sorted((one for one in found if one.name.startswith(NAME)), key=lambda one: str(one.id))


def _essence(one: AutomationCore) -> Any:
    """What an automation does, in the server's own form (sets in order, no ids)."""
    told = one.model_dump(mode="json", include={"name", "description", "trigger", "actions", "enabled"})
    told["trigger"] = {
        key: sorted(value) if key in ("after", "expect", "for_each") else value
        for key, value in told["trigger"].items()
        if key != "id"
    }
    return told
