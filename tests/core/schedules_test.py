"""Schedules and predicates over the training step."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import schedules

MILLION = 1_000_000


class SparsityScheduleTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(0, 1, 10 * MILLION)
  def test_constant_is_constant(self, step):
    self.assertEqual(
      self.variant(schedules.constant(0.9))(step), np.float32(0.9)
    )

  @chex.variants(with_jit=True, without_jit=True)
  def test_one_shot_jumps_at_its_step(self):
    schedule = self.variant(schedules.one_shot(0.9, step=10))
    values = [float(schedule(step)) for step in (0, 9, 10, 11)]
    np.testing.assert_allclose(values, [0, 0, 0.9, 0.9], rtol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(1, 2.5, 3)
  def test_polynomial_is_the_equation_of_zhu_and_gupta(self, power):
    start, stop, final = 20, 120, 0.95
    schedule = self.variant(schedules.polynomial(final, start, stop, power))
    steps = np.arange(0, 200, 7)
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))^3, with s_i = 0.
    inside = final + (0 - final) * (1 - (steps - start) / (stop - start)) ** 3
    if power != 3:
      inside = final * (1 - np.clip((stop - steps) / 100, 0, 1) ** power)
    expected = np.where(
      steps < start, 0, np.where(steps >= stop, final, inside)
    )
    values = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(values, expected, atol=1e-6)

  def test_polynomial_ends_at_exactly_its_sparsity(self):
    schedule = schedules.polynomial(0.98, 3, 10)
    self.assertEqual(schedule(3), 0)
    self.assertEqual(schedule(10), np.float32(0.98))
    self.assertEqual(schedule(10_000), np.float32(0.98))

  def test_polynomial_tells_large_steps_apart(self):
    """Float32 cannot hold 20,000,001; the difference is taken in integers."""
    start = 20 * MILLION
    schedule = schedules.polynomial(0.5, start, start + 4, power=1)
    self.assertEqual(float(schedule(start + 1)), 0.125)

  @parameterized.parameters(
    schedules.constant(0.5),
    schedules.one_shot(0.5, 3),
    schedules.polynomial(0.5, 0, 9),
  )
  def test_result_is_a_strong_float32_scalar(self, schedule):
    for step in (1, jnp.int32(1)):
      value = schedule(step)
      chex.assert_shape(value, ())
      self.assertEqual(value.dtype, jnp.float32)
      self.assertFalse(value.weak_type)

  @parameterized.parameters(-0.1, 1.0, 1.5, float('nan'), float('inf'))
  def test_sparsity_outside_the_unit_interval_is_refused(self, sparsity):
    for make in (
      schedules.constant,
      lambda s: schedules.one_shot(s, 1),
      lambda s: schedules.polynomial(s, 0, 1),
    ):
      with self.assertRaisesRegex(ValueError, r'sparsity.*\[0, 1\).*got'):
        make(sparsity)

  @parameterized.parameters(
    (lambda: schedules.one_shot(0.5, -1), 'step must be.*got -1'),
    (lambda: schedules.polynomial(0.5, 10, 10), 'start=10 and stop=10'),
    (lambda: schedules.polynomial(0.5, 0, 9, power=0), 'power must be.*got 0'),
    (lambda: schedules.polynomial(0.5, 0, 9, np.nan), 'power must be.*got nan'),
    (lambda: schedules.every(0), 'period must be.*got 0'),
    (lambda: schedules.every(2, start=5, stop=5), 'start=5, stop=5'),
    (lambda: schedules.every(2, start=-3), 'start must be.*got -3'),
    (lambda: schedules.at(), 'at least one step'),
    (lambda: schedules.at(4, -1), 'got -1'),
  )
  def test_impossible_settings_are_refused(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()

  def test_half_a_step_is_refused(self):
    with self.assertRaises(TypeError):
      schedules.one_shot(0.5, 1.5)


class WhenTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    (dict(period=4), [0, 4, 8, 12, 16]),
    (dict(period=4, start=1), [4, 8, 12, 16]),
    (dict(period=4, start=4, stop=16), [4, 8, 12]),
    (dict(period=4, stop=17), [0, 4, 8, 12, 16]),
    (dict(period=1, start=5, stop=8), [5, 6, 7]),
    (dict(period=30), [0]),
  )
  def test_every_is_true_at_multiples_inside_its_interval(self, given, steps):
    when = self.variant(schedules.every(**given))
    self.assertEqual([s for s in range(20) if when(s)], steps)

  @chex.variants(with_jit=True, without_jit=True)
  def test_at_is_true_at_its_steps_only(self):
    when = self.variant(schedules.at(3, 7, 7, 0))
    self.assertEqual([s for s in range(10) if when(s)], [0, 3, 7])

  @chex.variants(with_jit=True, without_jit=True)
  def test_never_is_never_true(self):
    when = self.variant(schedules.never)
    self.assertFalse(any(when(s) for s in range(5)))

  @parameterized.parameters(
    schedules.every(2, start=1, stop=9), schedules.at(3), schedules.never
  )
  def test_result_is_a_bool_scalar_for_cond_and_scan(self, when):
    def body(count, step):
      return jax.lax.cond(when(step), lambda c: c + 1, lambda c: c, count), None

    expected = sum(bool(when(step)) for step in range(10))
    count, _ = jax.lax.scan(body, jnp.int32(0), jnp.arange(10))
    self.assertEqual(int(count), expected)
    self.assertEqual(when(3).dtype, jnp.bool_)
    chex.assert_shape(when(jnp.int32(3)), ())
