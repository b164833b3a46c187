"""What users want of an endpoint: made, changed, tried again, rolled back, held.

A change is worked out outside of the store's one writing transaction (it reads files), then applied inside
if nobody else has changed the endpoint meanwhile; else it is worked out again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from dure.manager import audit, auth, changes, quota, revisions, rollout, schema, scope, views
from dure.manager.addresses import assign_address
from dure.manager.folders import Folders
from dure.manager.model import EndpointStatus, RolloutState
from dure.manager.revisions import Draft
from dure.manager.showing import shown
from dure.manager.store import Store, Tx, new_uid, now_ms
from dure.v1 import endpoint_pb2
from dure.wire import errors
from dure.wire.errors import Violation

ATTEMPTS_MAX = 5
REQUEST_ID_MAX = 128
# Updates of one endpoint wait for each other, or of many at once most would be worked out in vain.
QUEUES = 64


class _OnlyTried(Exception):
    """Ends a transaction that was only to show what it would do."""

    def __init__(self, endpoint: endpoint_pb2.Endpoint) -> None:
        super().__init__()
        self.endpoint = endpoint


class Revising:
    """All changes that users make to endpoints."""

    def __init__(self, store: Store, folders: Folders) -> None:
        self._store = store
        self._folders = folders
        self._queues = tuple(asyncio.Lock() for _ in range(QUEUES))

    async def create(
        self,
        parent: str,
        endpoint_id: str,
        wanted: endpoint_pb2.Endpoint,
        *,
        request_id: str = "",
        validate_only: bool = False,
    ) -> endpoint_pb2.Endpoint:
        """Raises InvalidInput with all that is wrong, NotFound, AlreadyExists, ResourceExhausted."""
        if len(request_id) > REQUEST_ID_MAX:
            violation = Violation("request_id", f"is longer than {REQUEST_ID_MAX} characters")
            raise errors.InvalidInput.of([violation])
        async with self._store.read() as session:
            project = await scope.project(session, parent)
            earlier = await _earlier(session, project, request_id)
            if earlier is not None:
                return await shown(session, project.name, earlier, replicas=False)
            draft = await revisions.draft(session, self._folders, project, wanted, endpoint_id)
        try:
            async with self._store.write() as tx:
                row = await self.insert(tx, project, endpoint_id, wanted, draft, request_id=request_id)
                await assign_address(tx, row, required=True)
                endpoint = await shown(tx.session, project.name, row, replicas=False)
                if validate_only:
                    raise _OnlyTried(endpoint)
        except _OnlyTried as tried:
            return tried.endpoint
        except IntegrityError as error:
            raise errors.AlreadyExists(
                f"project `{project.name}` has an endpoint `{endpoint_id}` already; delete it first, "
                "or choose another name",
                reason="ENDPOINT_EXISTS",
            ) from error
        return endpoint

    async def insert(
        self,
        tx: Tx,
        project: schema.Project,
        endpoint_id: str,
        wanted: endpoint_pb2.Endpoint,
        draft: Draft,
        *,
        request_id: str = "",
        validation: bool = False,
    ) -> schema.Endpoint:
        """A new endpoint with its first revision; one for a validation has no name and one replica."""
        # The folders were read outside of this transaction: nothing may have removed them since.
        await revisions.check_folders(tx.session, draft)
        count, now = 1 if validation else wanted.replica_count, now_ms()
        spec = draft.spec
        await quota.check(tx.session, project, None, count, spec["cluster_size"], spec["slots"])
        group = await tx.session.get(schema.ResourceGroup, spec["resource_group"])
        row = schema.Endpoint(
            uid=new_uid(),
            project_uid=project.uid,
            name=endpoint_id,
            living_name=None if validation else endpoint_id,
            request_id=request_id or None,
            created_ms=now,
            updated_ms=now,
            deleting=False,
            deleted_ms=None,
            replica_count=count,
            open_to_public=wanted.open_to_public and not validation,
            priority=draft.priority,
            rollout_policy=draft.rollout_policy,
            etag=new_uid(),
            revision=1,
            newest_revision=1,
            stable_revision=0,
            validation=validation,
            proxy_group=group.proxy_group if group is not None else "default",
            port=None,
            address="",
            # One that scales to zero by itself and is made with none begins there: a request wakes it.
            idle=count == 0 and draft.asked.scale_to_zero_after.ToNanoseconds() > 0,
            scale_to_zero_ms=draft.asked.scale_to_zero_after.ToNanoseconds() // 1_000_000,
            metrics_path=draft.asked.metrics_path,
            status=(EndpointStatus.PENDING if count else EndpointStatus.STOPPED).value,
            status_reason="",
            desired_replicas=count,
            ready_replicas=0,
            conditions=[],
            blocked=False,
            errors=[],
            failures=0,
            failed_ms=0,
            evictions=0,
            evicted_ms=0,
            last_error="",
            rollout={},
        )
        tx.session.add(row)
        tx.session.add_all(draft.rows(row.uid, 1, now, author=auth.current().name, change="created"))
        await tx.session.flush()
        if not validation:
            tx.event(row.uid, "ENDPOINT_CREATED", f"created with {count} replica(s), revision 1")
        tx.touch("endpoint", row.uid)
        return row

    async def update(
        self, wanted: endpoint_pb2.Endpoint, paths: Sequence[str], *, validate_only: bool = False
    ) -> endpoint_pb2.Endpoint:
        """Changes the fields that `paths` names. Raises as `create`, and Conflict for another etag."""
        async with self._queues[hash(wanted.name) % QUEUES]:
            return await self._update(wanted, paths, validate_only)

    async def _update(
        self, wanted: endpoint_pb2.Endpoint, paths: Sequence[str], validate_only: bool
    ) -> endpoint_pb2.Endpoint:
        for _ in range(ATTEMPTS_MAX):
            async with self._store.read() as session:
                project, row = await scope.endpoint(session, wanted.name, "endpoint.name")
                check_changeable(row, wanted.etag)
                revision = await session.get_one(schema.Revision, (row.uid, row.revision))
                before = revisions.asked(row, revision)
                after = changes.apply_mask(before, wanted, paths)
                draft = None
                # What shapes no replica makes no revision, and no file is read for it.
                if {path.split(".")[0] for path in paths} <= set(changes.UNSHAPED):
                    after = revisions.checked(after)
                else:
                    draft = await revisions.draft(session, self._folders, project, after, row.name)
                    after = draft.asked
            etag = row.etag
            try:
                async with self._store.write() as tx:
                    project, row = await scope.endpoint(tx.session, wanted.name, "endpoint.name")
                    if row.etag != etag:
                        continue
                    await self._change(tx, project, row, before, after, draft)
                    endpoint = await shown(tx.session, project.name, row, replicas=False)
                    if validate_only:
                        raise _OnlyTried(endpoint)
            except _OnlyTried as tried:
                return tried.endpoint
            return endpoint
        raise errors.Conflict(f"endpoint `{row.name}` is changed by others all the time; try again")

    async def _change(
        self,
        tx: Tx,
        project: schema.Project,
        row: schema.Endpoint,
        before: endpoint_pb2.Endpoint,
        after: endpoint_pb2.Endpoint,
        draft: Draft | None,
    ) -> None:
        revision = await tx.session.get_one(schema.Revision, (row.uid, row.revision))
        spec = draft.spec if draft is not None else revision.spec
        await quota.check(
            tx.session, project, row.uid, after.replica_count, spec["cluster_size"], spec["slots"]
        )
        sentence = changes.describe_changes(before, after)
        if row.replica_count != after.replica_count:
            row.replica_count = row.desired_replicas = after.replica_count
            # Whoever says a number owns it from now on: zero is no longer the autoscaler's.
            row.idle = row.idle and after.replica_count > 0
        row.open_to_public, row.priority = after.open_to_public, after.priority
        row.rollout_policy = revisions.policy_dict(after)
        row.metrics_path = after.metrics_path
        row.scale_to_zero_ms = after.scale_to_zero_after.ToNanoseconds() // 1_000_000
        fresh = draft is not None and draft.differs(revision)
        if draft is not None and fresh:
            await revisions.check_folders(tx.session, draft)
            # Files may have changed though nothing else did.
            sentence = sentence or "the definition file has changed"
            await new_revision(tx, row, draft, sentence)
            sentence += f": revision {row.revision}"
        if not sentence:
            return
        row.etag, row.updated_ms = new_uid(), now_ms()
        _foresee_status(row, fresh=fresh)
        # Values of variables may be secrets, and the trail is kept for long.
        auth.note(changes.describe_changes(*audit.without_values(before, after)) or sentence)
        tx.event(row.uid, "ENDPOINT_UPDATED", sentence)
        tx.touch("endpoint", row.uid)

    async def retry(self, name: str) -> endpoint_pb2.Endpoint:
        """Clears errors, reads the files again, and makes a revision of what they say if they changed."""
        async with self._store.read() as session:
            project, row = await scope.endpoint(session, name)
            check_changeable(row)
            revision = await session.get_one(schema.Revision, (row.uid, row.revision))
            draft = await revisions.redraft(session, self._folders, project, row, revision)
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, name)
            check_changeable(row)
            _clear_errors(row)
            row.etag, row.updated_ms = new_uid(), now_ms()
            sentence = "errors are cleared; replicas are started again"
            current = await tx.session.get_one(schema.Revision, (row.uid, row.revision))
            if draft.differs(current):
                spec, count = draft.spec, row.replica_count
                await quota.check(tx.session, project, row.uid, count, spec["cluster_size"], spec["slots"])
                await new_revision(tx, row, draft, "the definition file has changed")
                sentence += f" as revision {row.revision}, since the definition file has changed"
            elif row.rollout:
                state, policy = rollout.load_state(row.rollout), rollout.load_policy(row.rollout_policy)
                if state is not None and state.paused:
                    row.rollout = rollout.store_state(rollout.resume(state, policy, now_ms(), full=False))
            auth.note(sentence)
            tx.event(row.uid, "ENDPOINT_RETRIED", sentence)
            tx.touch("endpoint", row.uid)
            return await shown(tx.session, project.name, row, replicas=False)

    async def rollback(self, name: str, number: int) -> endpoint_pb2.Endpoint:
        """Wants an earlier revision again; 0 for the stable one, else the newest before that did not fail."""
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, name)
            check_changeable(row)
            revision = await _earlier_revision(tx.session, row, number)
            size, slots = revision.spec["cluster_size"], revision.spec["slots"]
            await quota.check(tx.session, project, row.uid, row.replica_count, size, slots)
            before, row.revision, revision.failed = row.revision, revision.number, ""
            _clear_errors(row)
            # Who goes back is in no mood for steps.
            row.rollout = rollout.store_state(RolloutState(revision.number, progress_ms=now_ms(), full=True))
            row.etag, row.updated_ms = new_uid(), now_ms()
            _foresee_status(row, fresh=True)
            sentence = f"rolled back from revision {before} to {revision.number}"
            auth.note(sentence)
            tx.event(row.uid, "ENDPOINT_ROLLED_BACK", sentence)
            tx.touch("endpoint", row.uid)
            return await shown(tx.session, project.name, row, replicas=False)

    async def pause(self, name: str) -> endpoint_pb2.Endpoint:
        """Raises FailedPrecondition without a rollout."""
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, name)
            state = _rollout(row)
            if not state.paused:
                stored = rollout.store_state(state)
                row.rollout = {**stored, "paused": True, "reason": ""}
                self._tell(tx, row, f"the rollout of revision {row.revision} is paused")
            return await shown(tx.session, project.name, row, replicas=False)

    async def resume(self, name: str, *, full: bool) -> endpoint_pb2.Endpoint:
        """Raises FailedPrecondition without a rollout."""
        async with self._store.write() as tx:
            project, row = await scope.endpoint(tx.session, name)
            state = _rollout(row)
            policy = rollout.load_policy(row.rollout_policy)
            row.rollout = rollout.store_state(rollout.resume(state, policy, now_ms(), full=full))
            how = "goes on without further steps" if full else "goes on"
            self._tell(tx, row, f"the rollout of revision {row.revision} {how}")
            return await shown(tx.session, project.name, row, replicas=False)

    def _tell(self, tx: Tx, row: schema.Endpoint, sentence: str) -> None:
        auth.note(sentence)
        tx.event(row.uid, "ROLLOUT_CHANGED", sentence)
        tx.touch("endpoint", row.uid)


async def new_revision(tx: Tx, row: schema.Endpoint, draft: Draft, change: str) -> None:
    """Makes the next revision the wanted one. What failed before says nothing of it."""
    row.newest_revision += 1
    row.revision = row.newest_revision
    tx.session.add_all(draft.rows(row.uid, row.revision, now_ms(), author=auth.current().name, change=change))
    _clear_errors(row)
    row.rollout = {}
    await tx.session.flush()


def check_changeable(row: schema.Endpoint, etag: str = "") -> None:
    if row.deleting:
        raise errors.FailedPrecondition(f"endpoint `{row.name}` is being deleted")
    if etag and etag != row.etag:
        raise stale(row)


def stale(row: schema.Endpoint) -> errors.Conflict:
    return errors.Conflict(
        f"endpoint `{row.name}` has changed since you read it; read it again", reason="ETAG_MISMATCH"
    )


def _clear_errors(row: schema.Endpoint) -> None:
    row.blocked, row.errors, row.last_error = False, [], ""
    row.failures, row.failed_ms, row.evictions, row.evicted_ms = 0, 0, 0, 0


def _rollout(row: schema.Endpoint) -> RolloutState:
    check_changeable(row)
    state = rollout.begin(views.endpoint_view(row), now_ms())
    if state is None:
        raise errors.FailedPrecondition(
            f"no rollout of endpoint `{row.name}` goes on; an update starts one: dure endpoint update",
            reason="NO_ROLLOUT",
        )
    return state


async def _earlier_revision(session: AsyncSession, row: schema.Endpoint, number: int) -> schema.Revision:
    if not number and row.stable_revision not in (0, row.revision):
        number = row.stable_revision
    if number == row.revision:
        raise errors.FailedPrecondition(
            f"revision {number} is the wanted one already", reason="SAME_REVISION"
        )
    query = select(schema.Revision).where(schema.Revision.endpoint_uid == row.uid)
    if number:
        query = query.where(schema.Revision.number == number)
    else:
        query = query.where(schema.Revision.number < row.revision, schema.Revision.failed == "")
    found = await session.scalar(query.order_by(schema.Revision.number.desc()).limit(1))
    if found is None:
        what = f"no revision {number}" if number else "no earlier revision to go back to"
        raise errors.NotFound(
            f"endpoint `{row.name}` has {what}; see: dure endpoint history {row.name}",
            reason="REVISION_NOT_FOUND",
        )
    return found


async def _earlier(session: AsyncSession, project: schema.Project, request_id: str) -> schema.Endpoint | None:
    """What an earlier call with the same request id made."""
    if not request_id:
        return None
    return await session.scalar(
        select(schema.Endpoint).where(
            schema.Endpoint.project_uid == project.uid, schema.Endpoint.request_id == request_id
        )
    )


def _foresee_status(row: schema.Endpoint, *, fresh: bool) -> None:
    """The status that a change brings at once: who reads, or waits, before the controller has run must not
    be told of a health that belongs to what was wanted before."""
    E = EndpointStatus
    if row.replica_count == 0:
        row.status, row.status_reason = E.STOPPED.value, "zero replicas are wanted"
    elif fresh:
        row.status, row.status_reason = E.UPDATING.value, f"revision {row.revision} is about to be rolled out"
    elif row.ready_replicas < row.replica_count and row.status in (E.STOPPED, E.HEALTHY):
        row.status = E.DEGRADED.value
        row.status_reason = f"{row.ready_replicas} of {row.replica_count} healthy"
