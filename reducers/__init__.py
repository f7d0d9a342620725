"""Reducers: which visual tokens the LLM keeps. One file per paper, and `door` for plain ways."""
