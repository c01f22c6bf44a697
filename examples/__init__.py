# SPDX-License-Identifier: Apache-2.0
"""Whole projects with the library, each one command from data to a page of results."""
