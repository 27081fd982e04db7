// Registers the implementations of one library under the schemas that Python defines (fastflow/extension.py).
#include "fastflow.h"

#if defined(FASTFLOW_SIMT)
#define FASTFLOW_LIBRARY STABLE_TORCH_LIBRARY_IMPL(fastflow_simt, CPU, m)
#elif defined(FASTFLOW_CUDA)
#define FASTFLOW_LIBRARY STABLE_TORCH_LIBRARY_IMPL(fastflow_cuda, CUDA, m)
#else
#define FASTFLOW_LIBRARY STABLE_TORCH_LIBRARY_IMPL(fastflow_cpu, CPU, m)
#endif

FASTFLOW_LIBRARY {
  m.impl("affine_coupling_fwd", TORCH_BOX(&fastflow::affine_coupling_fwd));
  m.impl("affine_coupling_bwd", TORCH_BOX(&fastflow::affine_coupling_bwd));
  m.impl("slogdet_fwd", TORCH_BOX(&fastflow::slogdet_fwd));
  m.impl("plu_weight_fwd", TORCH_BOX(&fastflow::plu_weight_fwd));
  m.impl("plu_weight_bwd", TORCH_BOX(&fastflow::plu_weight_bwd));
  m.impl("gaussian_fwd", TORCH_BOX(&fastflow::gaussian_fwd));
  m.impl("gaussian_bwd", TORCH_BOX(&fastflow::gaussian_bwd));
  m.impl("mlp_flow_fwd", TORCH_BOX(&fastflow::mlp_flow_fwd));
  m.impl("mlp_flow_bwd", TORCH_BOX(&fastflow::mlp_flow_bwd));
  m.impl("spline_fwd", TORCH_BOX(&fastflow::spline_fwd));
  m.impl("spline_bwd", TORCH_BOX(&fastflow::spline_bwd));
  m.impl("philox4x32", TORCH_BOX(&fastflow::philox4x32));
#if !defined(FASTFLOW_CUDA) && !defined(FASTFLOW_SIMT)
  m.impl("latent_head_fwd", TORCH_BOX(&fastflow::latent_head_fwd));
  m.impl("latent_head_bwd", TORCH_BOX(&fastflow::latent_head_bwd));
  m.impl("conv_net_fwd", TORCH_BOX(&fastflow::conv_net_fwd));
  m.impl("conv_net_bwd", TORCH_BOX(&fastflow::conv_net_bwd));
  m.impl("glow_step_fwd", TORCH_BOX(&fastflow::glow_step_fwd));
  m.impl("glow_step_bwd", TORCH_BOX(&fastflow::glow_step_bwd));
  m.impl("activated_conv_fwd", TORCH_BOX(&fastflow::activated_conv_fwd));
  m.impl("activated_conv_bwd", TORCH_BOX(&fastflow::activated_conv_bwd));
  m.impl("mlp_fwd", TORCH_BOX(&fastflow::mlp_fwd));
  m.impl("mlp_bwd", TORCH_BOX(&fastflow::mlp_bwd));
  m.impl("wide_mlp_fwd", TORCH_BOX(&fastflow::wide_mlp_fwd));
  m.impl("wide_mlp_bwd", TORCH_BOX(&fastflow::wide_mlp_bwd));
  m.impl("bernoulli_log_prob_fwd", TORCH_BOX(&fastflow::bernoulli_log_prob_fwd));
  m.impl("bernoulli_log_prob_bwd", TORCH_BOX(&fastflow::bernoulli_log_prob_bwd));
  m.impl("top_down_fwd", TORCH_BOX(&fastflow::top_down_fwd));
  m.impl("top_down_bwd", TORCH_BOX(&fastflow::top_down_bwd));
#endif
}
