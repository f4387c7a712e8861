"""The offline pattern search: which pattern, and which budget, each head gets."""

from minference_jax.search.allocate import allocate as allocate
from minference_jax.search.allocate import choose_globally as choose_globally
from minference_jax.search.budget import executed_share as executed_share
from minference_jax.search.budget import fit_budgets as fit_budgets
from minference_jax.search.budget import smallest_share as smallest_share
from minference_jax.search.calibration import Calibration as Calibration
from minference_jax.search.calibration import Calibrations as Calibrations
from minference_jax.search.calibration import Group as Group
from minference_jax.search.calibration import Kernel as Kernel
from minference_jax.search.candidates import Candidates as Candidates
from minference_jax.search.candidates import for_each_candidate as for_each_candidate
from minference_jax.search.cost import Measure as Measure
from minference_jax.search.objective import Objective as Objective
from minference_jax.search.scores import LayerScores as LayerScores
from minference_jax.search.scores import choose as choose
from minference_jax.search.scores import picked as picked
from minference_jax.search.search import score_candidates as score_candidates
from minference_jax.search.search import search_patterns as search_patterns
from minference_jax.search.space import FAMILIES as FAMILIES
from minference_jax.search.space import TABLE_7 as TABLE_7
from minference_jax.search.space import for_heads as for_heads
from minference_jax.search.space import shipped_space as shipped_space
from minference_jax.search.space import shipped_space_v2 as shipped_space_v2
