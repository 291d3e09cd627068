"""Decisions by a trained classifier, and the cascades that go on from one."""
