// Runs the cases through Vercel's AI SDK: node vercel_ai.mjs URL CASES.json. The last line is the answers.
import fs from 'node:fs';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, streamText } from 'ai';

const [url, file] = process.argv.slice(2);
globalThis.AI_SDK_LOG_WARNINGS = false;

// A name is no part of the SDK's messages: it goes the way of what only one provider knows.
function message({ role, content, name }) {
    const providerOptions = { openaiCompatible: name ? { name } : {} };
    return role === 'system' ? { role, content } : { role, content: [{ type: 'text', text: content, providerOptions }], providerOptions };
}

async function run({ body, key }) {
    if (body.n) return { unsupported: 'generateText 只给一条回复' };
    const provider = createOpenAICompatible({ name: 'characterglm', baseURL: url, apiKey: key, includeUsage: true });
    const options = {
        model: provider(body.model),
        messages: body.messages.map(message),
        allowSystemInMessages: true,
        temperature: body.temperature,
        maxOutputTokens: body.max_tokens,
        stopSequences: body.stop,
        seed: body.seed,
        maxRetries: 0,
        providerOptions: { characterglm: { chat_template_kwargs: body.chat_template_kwargs } },
    };
    let answer;
    if (body.stream) {
        let failure;
        answer = streamText({ ...options, onError: ({ error }) => { failure = error; } });
        await answer.consumeStream();
        if (failure) throw failure;
    } else {
        answer = await generateText(options);
    }
    const usage = await answer.usage;
    return {
        texts: [await answer.text],
        finish: [await answer.finishReason],
        tokens: [usage.inputTokens, usage.outputTokens],
    };
}

const answers = {};
for (const item of JSON.parse(fs.readFileSync(file, 'utf8'))) {
    try {
        answers[item.name] = await run(item);
    } catch (error) {
        answers[item.name] = { status: error.statusCode ?? null, error: `${error.name}: ${error.message}` };
    }
}
const version = name => JSON.parse(fs.readFileSync(new URL(`./node_modules/${name}/package.json`, import.meta.url))).version;
console.log(JSON.stringify([`${version('ai')} + ${version('@ai-sdk/openai-compatible')}`, answers]));
