"""Server optimizers: how a round of the log moves the trained values, at the server and at clients that replay it."""

from fedzo.zo.server_optimizer.adam import Adam as Adam
from fedzo.zo.server_optimizer.adam import AdamConfig as AdamConfig
from fedzo.zo.server_optimizer.base import SERVER_OPTIMIZERS as SERVER_OPTIMIZERS
from fedzo.zo.server_optimizer.base import ControlVariates as ControlVariates
from fedzo.zo.server_optimizer.base import Schedule as Schedule
from fedzo.zo.server_optimizer.base import ServerOptimizer as ServerOptimizer
from fedzo.zo.server_optimizer.base import ServerOptimizerConfig as ServerOptimizerConfig
from fedzo.zo.server_optimizer.base import ServerOptimizerTraits as ServerOptimizerTraits
from fedzo.zo.server_optimizer.base import VectorOptimizer as VectorOptimizer
from fedzo.zo.server_optimizer.base import build_server_optimizer as build_server_optimizer
from fedzo.zo.server_optimizer.base import decay as decay
from fedzo.zo.server_optimizer.base import learning_rate as learning_rate
from fedzo.zo.server_optimizer.base import round_direction as round_direction
from fedzo.zo.server_optimizer.base import step_along as step_along
from fedzo.zo.server_optimizer.control_variates import FedDyn as FedDyn
from fedzo.zo.server_optimizer.control_variates import FedDynConfig as FedDynConfig
from fedzo.zo.server_optimizer.control_variates import Scaffold as Scaffold
from fedzo.zo.server_optimizer.control_variates import ScaffoldConfig as ScaffoldConfig
from fedzo.zo.server_optimizer.sgd import Momentum as Momentum
from fedzo.zo.server_optimizer.sgd import MomentumConfig as MomentumConfig
from fedzo.zo.server_optimizer.sgd import Sgd as Sgd
from fedzo.zo.server_optimizer.sgd import SgdConfig as SgdConfig
