"""What a person looks at: the progress line of a running job, picture grids, loss curves and the HTML page.

Matplotlib is imported only when something is drawn.
"""
