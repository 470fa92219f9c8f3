/** The demo page: a panel for each channel, the state of the connection, and the form. */

import { Realtime } from './realtime.js';

const WEBSOCKETS = '/ws';

/** Lines that a panel keeps; older ones are removed. */
const LINES_SHOWN = 200;

/** Earlier messages that a panel opens with. */
const LINES_AT_FIRST = 20;

/** How long a broadcast may take from the click, in milliseconds. PHP and the daemon have 5 s of it. */
const DEADLINE = 10_000;

const element = id => document.getElementById(id);

const realtime = new Realtime(WEBSOCKETS);

// Channels. Their names are in the page's address too, so that it can be reloaded and shared.

/** @type {Map<string, Panel>} */
const panels = new Map();

class Panel {
  #root = element('panel').content.firstElementChild.cloneNode(true);
  #log = this.#root.querySelector('ol');
  #count = this.#root.querySelector('.count');
  #received = 0;
  #unsubscribe;

  /** Lines to show with the next frame. A hidden tab has no frames, so there are never more than fit. */
  #arrived = [];

  /** Whether the reader is at the end, at the newest message, and wants to stay there. */
  #following = true;

  constructor(channel) {
    this.#root.querySelector('h3').textContent = channel;
    this.#root.dataset.channel = channel;
    this.#log.setAttribute('aria-label', `Messages of ${channel}`);
    const button = this.#root.querySelector('button');
    button.title = `Unsubscribe from ${channel}`;
    button.setAttribute('aria-label', button.title);
    button.addEventListener('click', () => {
      unwatch(channel);
      element('new-channel').focus();
    });
    this.#log.addEventListener('scroll', () => {
      this.#following = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 8;
    });
    this.hold();
    element('panels').append(this.#root);
    this.#unsubscribe = realtime.subscribe(channel, (message, source) => this.#show(message, source), {
      last: LINES_AT_FIRST,
      onSubscribed: subscribed => this.#listen(subscribed),
      onError: error => {
        unwatch(channel);
        element('refusal').textContent = error.message;
      },
    });
  }

  /** Show that no messages arrive at the moment. */
  hold() {
    this.#root.dataset.state = 'pending';
    this.#count.textContent = realtime.state === 'connected' ? 'subscribing…' : 'not connected';
  }

  remove() {
    this.#unsubscribe();
    this.#root.remove();
  }

  #listen({ recovered, replayed }) {
    this.#root.dataset.state = 'live';
    this.#showCount();
    if (recovered !== undefined) {
      this.#print(() => returnLine(recovered, replayed));
    }
  }

  #show(message, source) {
    const time = new Date(source.time ?? Date.now());
    this.#received += 1;
    this.#print(() => messageLine(message, source, time));
  }

  /** Show a line. It is made only if it will be seen. */
  #print(makeLine) {
    this.#arrived.push(makeLine);
    if (this.#arrived.length > LINES_SHOWN) {
      this.#arrived.shift();
    }
    if (this.#arrived.length === 1) {
      requestAnimationFrame(() => this.#printAll());
    }
  }

  #printAll() {
    this.#log.append(...this.#arrived.map(makeLine => makeLine()));
    this.#arrived = [];
    while (this.#log.childElementCount > LINES_SHOWN) {
      this.#log.firstElementChild.remove();
    }
    if (this.#following) {
      this.#log.scrollTop = this.#log.scrollHeight;
    }
    this.#showCount();
    pulse();
  }

  #showCount() {
    if (this.#root.dataset.state === 'live') {
      const plural = this.#received === 1 ? '' : 's';
      this.#count.textContent = this.#received === 0 ? 'listening' : `${this.#received} message${plural}`;
    }
  }
}

function messageLine(message, { offset, replayed }, time) {
  const clock = document.createElement('time');
  clock.dateTime = time.toISOString();
  clock.textContent = timeInWords(time);
  clock.title = `Sent ${time.toLocaleString()}`;
  const content = typeof message === 'string' ? message : `${message.length} bytes: ${hexadecimal(message)}`;
  const line = document.createElement('li');
  line.classList.toggle('replayed', replayed);
  line.append(span('offset', offset), span('message', content), clock);
  return line;
}

/** The time of day, after the date if that is another day. */
function timeInWords(time) {
  const clock = time.toTimeString().slice(0, 8);
  return time.toDateString() === new Date().toDateString() ? clock : `${time.toLocaleDateString()} ${clock}`;
}

/** The effect of a reconnection on a channel, in words; the missed messages follow. */
function returnLine(recovered, replayed) {
  const line = document.createElement('li');
  line.className = recovered ? 'resumed' : 'gap';
  if (!recovered) {
    line.textContent = 'Connected again, but history no longer reaches back: messages are missing here.';
  } else if (replayed === 0) {
    line.textContent = 'Connected again, nothing missed.';
  } else {
    line.textContent = `Connected again: ${replayed} missed message${replayed === 1 ? '' : 's'} came in.`;
  }
  return line;
}

function span(className, text) {
  const made = document.createElement('span');
  made.className = className;
  made.textContent = text;
  return made;
}

function hexadecimal(bytes) {
  const shown = Array.from(bytes.subarray(0, 32), byte => byte.toString(16).padStart(2, '0')).join(' ');
  return bytes.length > 32 ? `${shown} …` : shown;
}

function watch(channel) {
  if (!panels.has(channel)) {
    panels.set(channel, new Panel(channel));
    channelsChanged();
  }
}

function unwatch(channel) {
  panels.get(channel)?.remove();
  panels.delete(channel);
  channelsChanged();
}

function channelsChanged() {
  const address = new URL(location.href);
  address.searchParams.delete('channel');
  const options = [];
  for (const channel of panels.keys()) {
    address.searchParams.append('channel', channel);
    const option = document.createElement('option');
    option.value = channel;
    options.push(option);
  }
  history.replaceState(null, '', address);
  element('watched').replaceChildren(...options);
}

element('new-channel').addEventListener('input', () => {
  element('refusal').textContent = '';
});

element('subscribe').addEventListener('submit', event => {
  event.preventDefault();
  const input = element('new-channel');
  element('refusal').textContent = panels.has(input.value) ? `You are watching “${input.value}” already.` : '';
  watch(input.value);
  input.value = '';
});

const asked = new URL(location.href).searchParams.getAll('channel');
for (const channel of asked.length > 0 ? asked : ['news']) {
  watch(channel);
}

// The connection.

const RESTARTING = 4503;
const BROKEN = 1006;

function stateInWords({ state, client, code }) {
  switch (state) {
    case 'connecting':
      return 'Connecting…';
    case 'connected':
      return `Connected as ${client}`;
    case 'offline':
      return 'This browser is offline';
    case 'waiting':
      return code === RESTARTING ? 'The server is restarting' : 'Not connected';
    default:
      return code === undefined ? 'Disconnected' : 'Disconnected by the server';
  }
}

let countdown;

function showConnection() {
  const { status } = realtime;
  element('connection').dataset.state = status.state;
  element('state').textContent = stateInWords(status);
  element('connect').hidden = status.state === 'connected' || status.state === 'connecting';
  element('disconnect').hidden = status.state !== 'connected';
  clearInterval(countdown);
  const showCountdown = () => {
    const { retryIn } = realtime.status;
    element('countdown').textContent = retryIn === undefined ? '' : `next try in ${Math.ceil(retryIn / 1000)} s`;
  };
  showCountdown();
  if (status.retryIn !== undefined) {
    countdown = setInterval(showCountdown, 250);
  }
}

function showTrouble(sentence) {
  element('trouble').textContent = sentence;
  element('trouble').hidden = sentence === '';
}

realtime.addEventListener('state', async ({ detail: { state, code } }) => {
  showConnection();
  for (const panel of panels.values()) {
    panel.hold();
  }
  if (state === 'connected' || state === 'closed') {
    showTrouble('');
  }
  if (state === 'waiting' && code === BROKEN) {
    const sentence = await diagnosis();
    if (realtime.state !== 'connected') {
      showTrouble(sentence);
    }
  }
});

/** A browser does not tell a page why a WebSocket failed. A plain request for the same address does. */
async function diagnosis() {
  let response;
  try {
    // With GET the browser would not send the Origin, which is what may be wrong.
    response = await fetch(WEBSOCKETS, { method: 'POST', cache: 'no-store', redirect: 'manual' });
  } catch (error) {
    if (error instanceof TypeError) {
      return 'The web server cannot be reached. Is Caddy running?';
    }
    throw error;
  }
  switch (response.status) {
    case 403:
      return await response.text();
    case 426:
      return 'realtimed is there, but has not opened a WebSocket yet. If this lasts, a proxy in between may not pass them on, or a limit on connections is reached.';
    case 502:
    case 503:
    case 504:
      return `Caddy is there, but realtimed does not answer (${response.status}). Is it running, at the address that Caddy’s REALTIME_UPSTREAM names?`;
    default:
      return `There is no realtimed behind ${WEBSOCKETS}: the web server says ${response.status}.`;
  }
}

realtime.addEventListener('error', event => {
  event.preventDefault();
  showTrouble(event.detail.message);
});

element('connect').addEventListener('click', () => realtime.connect());
element('disconnect').addEventListener('click', () => realtime.close());
showConnection();

/** Animate the sign at the top of the page. */
function pulse() {
  const sign = document.querySelector('.name svg');
  const isBusy = sign.getAnimations({ subtree: true }).length > 0;
  if (!isBusy && !matchMedia('(prefers-reduced-motion: reduce)').matches) {
    sign.querySelectorAll('path').forEach((arc, index) => {
      arc.animate({ opacity: [1, 0.15, 1] }, { duration: 500, delay: index * 120, easing: 'ease-out' });
    });
  }
}

// The form.

const form = element('send');

/** Broadcasts are sent one after the other, so that they arrive in the order in which they were made. */
let sending = Promise.resolve();

/** Broadcasts without an outcome yet. */
let pending = 0;

/** The last failure since none was pending; a later success does not hide it. */
let failed;

/** Clicks until the last broadcast that took too long: earlier clicks that still wait behind it are given up. */
let clicks = 0;
let givenUp = 0;

form.addEventListener('submit', event => {
  event.preventDefault();
  const content = new FormData(form);
  const deadline = AbortSignal.timeout(DEADLINE);
  const click = (clicks += 1);
  failed = pending === 0 ? undefined : failed;
  pending += 1;
  showOutcome('pending', pending === 1 ? 'Broadcasting…' : `Broadcasting ${pending} messages…`);
  sending = sending.then(() => send(content, click, deadline));
  if (document.activeElement === element('message')) {
    element('message').select(); // typing replaces it with the next message
  }
});

/** @param {'pending' | 'done' | 'failed'} state */
function showOutcome(state, sentence) {
  element('outcome').className = state;
  element('outcome').textContent = sentence;
  form.setAttribute('aria-busy', String(pending > 0));
}

async function send(content, click, deadline) {
  const outcome =
    click <= givenUp ? failure('Not broadcast: what was before it took too long.') : await outcomeOf(content, deadline);
  pending -= 1;
  failed = outcome.state === 'failed' ? outcome : failed;
  const shown = failed ?? outcome;
  // While others are on their way, show only failures.
  if (pending === 0 || shown === failed) {
    showOutcome(shown.state, shown.sentence);
  }
}

/** Broadcast the form's message and show the outcome. */
async function outcomeOf(content, deadline) {
  try {
    const response = await fetch(form.action, {
      method: 'POST',
      headers: { Accept: 'application/json' },
      body: content,
      signal: deadline,
    });
    const isJson = response.headers.get('Content-Type')?.startsWith('application/json');
    if (!isJson) {
      const isKnown = response.status >= 400 && response.status < 500;
      return failure(`${isKnown ? 'Not broadcast' : 'It may have been broadcast or not'}: the web server says ${response.status}.`);
    }
    const answer = await response.json();
    return response.ok ? { state: 'done', sentence: answer.sentence } : failure(answer.error);
  } catch (error) {
    if (deadline.aborted) {
      givenUp = clicks;
      const seconds = DEADLINE / 1000;
      return failure(`No answer within ${seconds} s: it may have been broadcast or not. Has PHP-FPM a worker free?`);
    }
    if (error instanceof TypeError) {
      return failure('No answer: the web server cannot be reached.');
    }
    if (error instanceof SyntaxError) {
      return failure('It may have been broadcast or not: the answer is not JSON. PHP’s error log may say why.');
    }
    reportError(error);
    return failure('Something went wrong here: the browser’s console says what.');
  }
}

function failure(sentence) {
  return { state: 'failed', sentence };
}

// The same in code, with the form's content quoted as each language wants it.

const inPhp = text => `'${text.replace(/[\\']/g, '\\$&')}'`;
const inShell = text => (/^[\w.,:/=@-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const inPython = text => JSON.stringify(text);

function showCode() {
  const channel = element('channel').value;
  const message = element('message').value;
  element('code-php').textContent = `broadcast(${inPhp(channel)}, ${inPhp(message)});`;
  element('code-python').textContent = `broadcast(${inPython(channel)}, ${inPython(message)})`;
  // A message that begins with a dash would be an option, and a dash alone standard input.
  const shellChannel = (channel.startsWith('-') ? '-- ' : '') + inShell(channel);
  element('code-shell').textContent = message.startsWith('-')
    ? `printf %s ${inShell(message)} | realtimectl broadcast ${shellChannel} -`
    : `realtimectl broadcast ${shellChannel} ${inShell(message)}`;
}

form.addEventListener('input', showCode);
showCode();
