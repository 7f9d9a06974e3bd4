"""Folders of KV pages on disk, looked after while no engine uses them, or beside one that does; and
pages as files, on their way to another folder."""
