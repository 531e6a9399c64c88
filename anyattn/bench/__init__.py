"""What `anyattn bench`, `anyattn tune` and the checkout's benchmarks/ share: timing, the rivals, the error, the chart.

No other part of the package imports it.
"""
