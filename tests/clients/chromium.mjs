// Serves chromium.html to a headless Chromium, does for it what a page cannot, and prints what it found.
import { spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import http from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Checks, bodies, broadcast, drain, login, url } from './support.mjs'

/** How long the browser may be silent, milliseconds. */
const SILENCE = 120_000

const checks = new Checks('chromium')
const profile = mkdtempSync(join(tmpdir(), 'chromium-'))
const version = String(spawnSync('chromium', ['--version'], { stdio: ['ignore', 'pipe', 'ignore'] }).stdout).match(/[\d.]+/)?.[0]
let browser, silence

function end() {
  browser?.removeAllListeners('exit')
  try {
    // With all its processes, which are a group of their own.
    process.kill(-browser.pid, 'SIGKILL')
  } catch {}
  rmSync(profile, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 })
  checks.finish(version, 16)
}

function wait() {
  clearTimeout(silence)
  silence = setTimeout(() => { checks.report('the browser', 'says nothing'); end() }, SILENCE)
}

const calls = {
  '/begin': () => ({ url, logins: login(), bodies }),
  '/broadcast': ({ body, offline }) => broadcast(body, offline),
  '/drain': () => { drain(); return {} },
  '/report': ({ name, error }) => { checks.report(name, error); return {} },
  '/end': () => { setImmediate(end); return {} },
}

const server = http.createServer(async (request, response) => {
  wait()
  if (request.method === 'GET') {
    response.writeHead(request.url === '/' ? 200 : 404, { 'Content-Type': 'text/html' })
    response.end(request.url === '/' ? readFileSync(new URL('chromium.html', import.meta.url)) : '')
    return
  }
  try {
    let body = ''
    for await (const part of request.setEncoding('utf8')) body += part
    response.end(JSON.stringify(await calls[request.url](JSON.parse(body))))
  } catch (error) {
    response.writeHead(500).end(error.message)
  }
})

server.listen(0, '127.0.0.1', () => {
  // Without its sandbox, which root cannot have; the only page it opens is ours.
  browser = spawn('chromium', [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking', '--no-first-run',
    '--no-proxy-server', `--user-data-dir=${profile}`, '--remote-debugging-port=0', `http://127.0.0.1:${server.address().port}/`,
  ], { stdio: 'ignore', detached: true })
  browser.on('error', error => { checks.report('the browser', error.message); end() })
  browser.on('exit', code => { checks.report('the browser', `ended with ${code}`); end() })
  wait()
})
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, end)
