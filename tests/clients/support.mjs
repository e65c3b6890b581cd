// What the clients that run in Node share: the server, the checks and their lines.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { promisify } from 'node:util'

const run = promisify(execFile)
const env = process.env
/** How long a check may take, milliseconds. */
const DEADLINE = 60_000

/** Where devices connect. */
export const url = env.CLIENTS_URL
/** The first message of a device. `since`: its cursor. */
export const login = (since = 0) =>
  JSON.stringify({ type: 'login', app: env.CLIENTS_APP, account: 'ada', device: 'd1', platform: 'web', token: env.CLIENTS_TOKEN, since })

/** The contents that have to arrive whole: one, three and four bytes a character; the latter two in frames with a 16-bit length. */
export const bodies = { ASCII: 'Closing early today', '4096 characters of CJK': '廣播訊息'.repeat(1024), '4-byte UTF-8': '🦀😀𝄞🎉'.repeat(1024) }

/** Broadcasts; the id. `offline`: whether it is retained. */
export async function broadcast(body, offline = false) {
  const more = offline ? ['--offline'] : []
  const { stdout } = await run(env.CLIENTS_BINARY, [
    'send', '--url', env.CLIENTS_HTTP, '--app', env.CLIENTS_APP, '--secret-file', env.CLIENTS_SECRET_FILE, '--body', body, ...more])
  const answer = JSON.parse(stdout)
  assert.equal(answer.code, 200)
  return answer.msg.broadcastId
}

/** Asks the server to drain. */
export const drain = () => process.kill(Number(env.CLIENTS_SERVER), 'SIGTERM')

/** Whether a close says, as it should of a node that goes away, when to come back. */
export function assertComeBack({ code, reason }) {
  assert.equal(code, 1012)
  const { reconnectAfterMs } = JSON.parse(reason)
  assert.ok(Number.isInteger(reconnectAfterMs) && reconnectAfterMs > 0, reason)
}

/** The checks of one client. */
export class Checks {
  passed = 0
  failed = 0

  constructor(client) {
    this.client = client
  }

  /** Runs one. */
  async check(name, body) {
    let timer
    const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error('takes too long')), DEADLINE) })
    try {
      await Promise.race([body(), late])
      this.report(name)
    } catch (error) {
      this.report(name, String(error.message).split('\n').filter(Boolean).join(' ').slice(0, 300))
    } finally {
      clearTimeout(timer)
    }
  }

  /** Prints its line. */
  report(name, error = null) {
    if (error === null) this.passed += 1
    else this.failed += 1
    console.log(error === null ? `ok      ${this.client}: ${name}` : `FAIL    ${this.client}: ${name}: ${error}`)
  }

  /** Prints the sum, and ends the process. `least`: fewer were not all. */
  finish(version, least) {
    if (this.passed + this.failed < least) this.report('all checks', `${this.passed + this.failed} of ${least} were made`)
    console.log(`${this.client} ${version}: ${this.passed} passed, ${this.failed} failed`)
    process.exit(this.failed === 0 ? 0 : 1)
  }
}
