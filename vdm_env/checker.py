"""Checks."""


def check_env_spec(env):
    """x"""


def check_model(m):
    """x"""


def check_reward(r):
    """x"""
