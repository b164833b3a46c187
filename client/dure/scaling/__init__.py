"""Scaling decisions, as values and functions of values: the manager decides by them, and `dure rule simulate`
replays series against them without a manager.

    values    rules, samples, what is decided
    decide    rules and samples, a clock -> a decision with its reasons
    series    windows of samples: averages, rates of counters, quantiles of histograms
"""
